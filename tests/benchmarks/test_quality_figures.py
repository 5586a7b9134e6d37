"""The figures of a table whose rows have unlike objectives, from evaluated runs made by hand."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from gbla_rec.evaluation.per_user import write_per_user
from gbla_rec.evaluation.run_group import EvaluatedRun, RunGroup
from gbla_rec.evaluation.summaries import summarise

ROOT = Path(__file__).resolve().parents[2]
NUM_USERS = 40
DIFFICULTY = np.linspace(0.2, 0.6, NUM_USERS)
SCORES = {"joint": ("joint", "generative", "item"), "item": ("item",), "generative": ("generative",)}
"""By objective, the main score first, as evaluation writes them."""
# Recall of each row and score above the difficulty that users have in common
ABOVE = {
    "hybrid": {"joint": 0.25, "generative": 0.125, "item": 0.0625},
    "sasrec": {"item": 0.03},
    "tiger": {"generative": 0.0},
}
BASELINE = 0.0078125
REMOVED = 0.015625
"""What all gain without the items of the own history."""


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT)
    yield


@dataclass(frozen=True)
class Job:
    """What the report reads of a ``RunJob``."""

    configuration: Any
    config: Any
    name: str
    directory: Path
    results: Path


def jobs_of(directory: Path, name: str, num_seeds: int = 2) -> list[Job]:
    """Evaluated runs of a row; its seeds lie ``2 ** -9`` apart on both sides of ``ABOVE``."""
    objective = next(objective for objective, scores in SCORES.items() if scores == tuple(ABOVE[name]))
    jobs = []
    for seed in range(num_seeds):
        of_seed = (seed - (num_seeds - 1) / 2) / 512
        run = f"films.{name}.seed{seed}"
        methods = {score: run if place == 0 else f"{run} ({score})" for place, score in enumerate(ABOVE[name])}
        values = {method: DIFFICULTY + ABOVE[name][score] + of_seed for score, method in methods.items()}
        columns = {method: {"Recall@10": recall, "NDCG@10": recall / 2} for method, recall in values.items()}
        columns["item-kNN"] = {"Recall@10": np.full(NUM_USERS, BASELINE), "NDCG@10": np.full(NUM_USERS, BASELINE / 2)}
        run_dir = directory / name / f"20260101T00000{seed}_000000Z"
        run_dir.mkdir(parents=True)
        whole = {"history_slice": "all", "cold_slice": "all"}
        users = pl.DataFrame({"user_row": np.arange(NUM_USERS), "history_length": 9, "rarest_target_events": 9} | whole)
        # beams are swept for the generative score alone
        searched = {method: columns[method] for score, method in methods.items() if score == "generative"}
        without_history = {method: {name: x + REMOVED for name, x in metrics.items()} for method, metrics in columns.items()}
        results = {
            "checkpoint": "step_00000010",
            "dataset": {"name": "films", "content_hash": "abc"},
            "protocol": {"split": "test", "users": NUM_USERS, "candidates": 9, "history": "kept", "num_beams": 50},
            "scores": methods,
            "methods": summarise(columns, 20),
            "other_history": {"history": "removed", "methods": summarise(without_history, 20)},
            "slices": {"history_length": [slice_of("0-7", columns, slice(10)), slice_of("8+", columns, slice(0))]},
            "beam_sweep": [{"num_beams": 20, "methods": summarise(searched, 20)}] if searched else [],
            "per_user": write_per_user(run_dir, users, {"kept": columns}),
            "config": {"name": run, "seed": seed, "model": {"objective": objective}, "evaluation": {"joint_beams": 200, "num_beams": 50}},
            "versions": {"commit": "0" * 40},
        }
        (run_dir / "results.json").write_text(json.dumps(results))
        config = SimpleNamespace(training=SimpleNamespace(num_steps=10))
        described = SimpleNamespace(name=name, text=f"the row {name}")
        jobs.append(Job(described, config, run, directory / "quality" / run, run_dir / "results.json"))
    return jobs


def slice_of(label: str, columns: dict[str, dict[str, Any]], users: slice) -> dict[str, Any]:
    """As evaluation writes a slice; one without users has no methods."""
    inside = {method: {name: values[users] for name, values in metrics.items()} for method, metrics in columns.items()}
    count = len(range(NUM_USERS)[users])
    return {"label": label, "users": count, "methods": summarise(inside, 20) if count else {}}


def row_of(directory: Path, name: str, num_seeds: int = 2) -> Any:
    from benchmarks.quality.collect import Row

    jobs = jobs_of(directory, name, num_seeds)
    return Row(tuple(jobs), RunGroup.of([EvaluatedRun.open(job.results.parent) for job in jobs], name))


def test_a_pair_differs_by_its_main_scores_even_where_these_are_unlike(tmp_path: Path) -> None:
    from benchmarks.quality.collect import pair_figures

    hybrid, sasrec = row_of(tmp_path, "hybrid"), row_of(tmp_path, "sasrec")
    forth, back = ({line["metric"]: line for line in pair_figures(*pair)} for pair in ((hybrid, sasrec), (sasrec, hybrid)))
    for lines, names, sign in ((forth, ("hybrid (joint)", "sasrec (item)"), "+"), (back, ("sasrec (item)", "hybrid (joint)"), "-")):
        assert {(line["first"], line["second"]) for line in lines.values()} == {names}
        # 0.25 - 0.03, the same for every user: joint less item, not item less item
        assert lines["Recall@10"]["difference"] == f"{sign}0.2200" and lines["NDCG@10"]["difference"] == f"{sign}0.1100"
        assert lines["Recall@10"]["over users"] == f"{sign}0.2200 to {sign}0.2200"
        low, high = (float(end) for end in lines["Recall@10"]["over users and seeds"].split(" to "))
        assert low < float(lines["Recall@10"]["difference"]) < high, "seeds differ where users do not"


def test_a_pair_with_a_row_of_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    from benchmarks.quality.collect import pair_figures

    hybrid, sasrec = row_of(tmp_path, "hybrid"), row_of(tmp_path, "sasrec", num_seeds=1)
    assert {line["over users and seeds"] for line in pair_figures(hybrid, sasrec)} == {None}


@pytest.mark.parametrize("reference", ["hybrid", "sasrec"])
def test_rows_of_mixed_objectives_are_held_to_the_same_score_or_the_main_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    from benchmarks.quality.collect import write_table
    from benchmarks.quality.tables import TABLES, Table

    monkeypatch.setitem(TABLES, "mixed", Table(configurations=tuple(ABOVE), reference=reference, text="Mixed."))
    jobs = [job for name in ABOVE for job in jobs_of(tmp_path, name)]
    page = write_table("mixed", "films", jobs, "the command", tmp_path)
    report = json.loads(page.with_suffix(".json").read_text())
    figures = {(line["configuration"], line["score"]): line for line in report["details"]["All figures"] if line["metric"] == "Recall@10"}
    scores = [(name, score) for name, above in ABOVE.items() for score in above]
    assert list(figures) == [*scores, ("item-kNN", "")], "baselines come once, and no score of a model is one"
    main = next(iter(ABOVE[reference]))
    for name, score in scores:
        line = figures[name, score]
        assert line["seeds"] == 2 and line["mean"] == pytest.approx(DIFFICULTY.mean() + ABOVE[name][score])
        if (name, score) == (reference, main):
            assert "difference" not in line
            continue
        # the reference row's own further scores are held to its main one
        other = score if name != reference and score in ABOVE[reference] else main
        expected = ABOVE[name][score] - ABOVE[reference][other]
        assert [line[key] for key in ("difference", "difference low", "difference high")] == pytest.approx([expected] * 3), (name, score)
    single = {}
    for line in report["details"]["Single runs"]:
        single.setdefault((line["configuration"], line["score"]), []).append((line["seed"], line["commit"], line["Recall@10"]))
    assert list(single) == scores
    for key, runs in single.items():
        assert [run[:2] for run in runs] == [(0, "0" * 40), (1, "0" * 40)]
        assert sum(run[2] for run in runs) / 2 == pytest.approx(figures[key]["mean"])
    pairs = {(line["first"], line["second"]) for line in report["tables"]["Main scores, row against row"]}
    assert pairs == {("hybrid (joint)", "sasrec (item)"), ("hybrid (joint)", "tiger (generative)"), ("sasrec (item)", "tiger (generative)")}
    assert [(line["configuration"], line["score"]) for line in report["tables"]["Beams"]] == [
        (name, "generative") for name in ("hybrid", "tiger")
    ]
    assert "50 beams (joint: 200)" in page.read_text()


def test_without_its_reference_a_table_is_held_to_the_first_row_that_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.quality.collect import write_table
    from benchmarks.quality.tables import TABLES, Table

    monkeypatch.setitem(TABLES, "mixed", Table(configurations=tuple(ABOVE), reference="hybrid", text="Mixed."))
    jobs = [job for name in ("tiger", "sasrec") for job in jobs_of(tmp_path, name)]
    page = write_table("mixed", "films", jobs, "the command", tmp_path)
    assert "Differences are to `tiger`" in page.read_text()
    unfinished = [dataclasses.replace(job, results=None) for job in jobs_of(tmp_path / "hybrid", "hybrid")]
    with pytest.raises(ValueError, match="the reference row 'hybrid' must have a finished run; finished are none"):
        write_table("mixed", "films", unfinished, "the command", tmp_path)


def test_slices_and_the_other_history_are_means_over_seeds(tmp_path: Path) -> None:
    from benchmarks.quality.collect import other_history_figures, slice_tables

    rows = [row_of(tmp_path, name) for name in ("hybrid", "sasrec")]
    others = {(line["configuration"], line["score"]): line["Recall@10"] for row in rows for line in other_history_figures(row)}
    expected = {(row.name, score): DIFFICULTY.mean() + above + REMOVED for row in rows for score, above in ABOVE[row.name].items()}
    assert others == pytest.approx(expected)
    lines = slice_tables(rows)["By events before the targets"]
    assert [(line["configuration"], line["score"], line["slice"], line["users"]) for line in lines] == [
        ("hybrid", "joint", "0-7", 10),
        ("sasrec", "item", "0-7", 10),
    ]
    for line, above in zip(lines, (ABOVE["hybrid"]["joint"], ABOVE["sasrec"]["item"]), strict=True):
        assert line["Recall@10"] == pytest.approx(DIFFICULTY[:10].mean() + above)


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("quality_*.json")), ids=lambda path: path.stem)
def test_the_page_of_a_committed_table_shows_the_details_at_the_cutoff_of_its_table(path: Path) -> None:
    from benchmarks.quality.collect import ALL_FIGURES, ALL_PAIRS, PAIRS, _shown
    from benchmarks.quality.tables import TABLES

    (table,) = (table for name, table in TABLES.items() if path.stem.startswith(f"quality_{name}_"))
    report = json.loads(path.read_text())
    assert report["rows"] == _shown(report["details"][ALL_FIGURES], table)
    cutoff = f"@{table.shown_cutoff}"
    shown = [line for line in report["details"].get(ALL_PAIRS, []) if line["metric"].endswith(cutoff)]
    assert report["tables"].get(PAIRS, []) == shown
    # of two rows or more, the page has differences between all
    assert bool(shown) == (len({line["configuration"] for line in report["rows"] if line["score"]}) > 1)
