"""A report about one run, several seeds, patterns and datasets: every figure, table and number is there, in both forms."""

import base64
import json
import re
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_rec import workspace
from gbla_rec.evaluation.report import report
from gbla_rec.evaluation.report_data import group_runs
from gbla_rec.evaluation.report_page import Figure

NUM_USERS = 90


def values(mean: float, seed: int) -> np.ndarray:
    return mean + 0.1 * np.random.default_rng(seed).standard_normal(NUM_USERS)


def log(run_dir: Path, *losses: float) -> None:
    lines = [json.dumps({"step": 10 * step, "kind": "train", "loss": loss}) for step, loss in enumerate(losses)]
    lines.append(json.dumps({"step": 20, "kind": "validation", "nll": 4.5, "num_targets": 7}))
    # a kill cuts the last line short
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "ki']))


def images_of(html: str) -> list[str]:
    found = re.findall(r'<img src="data:image/svg\+xml;base64,([^"]+)"', html)
    return [base64.b64decode(image).decode() for image in found]


def test_one_run_makes_a_page_whose_html_needs_no_other_file(evaluated_runs: Any, tmp_path: Path) -> None:
    run_dir = evaluated_runs.write("solo", 3, values(0.4, 0))
    page = report([run_dir])
    markdown, html = page.write(tmp_path / "out")
    text, shown = markdown.read_text(), html.read_text()
    assert f"{values(0.4, 0).mean():.4f} (" in text and f"{values(0.4, 0).mean():.4f} (" in shown
    assert "| item-kNN | 1 | 0.2500 (0.2500-0.2500) |" in text
    assert not re.findall(r'(?:src|href)="(?!data:)', shown)
    figures = [block for block in page.blocks if isinstance(block, Figure)]
    assert images_of(shown) == [figure.svg for figure in figures]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        ["report.html", "report.md", *(f"{figure.name}.svg" for figure in figures)]
    )
    for figure in figures:
        ET.fromstring(figure.svg)
        assert f"({figure.name}.svg)" in text
    assert "training" not in {figure.name for figure in figures}, "there is no log"
    assert "Paired differences" not in text, "there is nothing to compare with"


def test_runs_of_the_workspace_are_named_as_in_any_copy_of_it(evaluated_runs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = evaluated_runs.write("solo", 3, values(0.4, 0))
    link = tmp_path / "link"
    link.symlink_to(run_dir.parent, target_is_directory=True)
    within, outside = run_dir.name, str(run_dir)
    cases = [(run_dir.parent, run_dir, within), (link, run_dir, within), (run_dir.parent, link / within, within)]
    for place, (root, given, shown) in enumerate([*cases, (tmp_path / "elsewhere", run_dir, outside)]):
        monkeypatch.setenv(workspace.VARIABLE, str(root))
        text = report([given]).write(tmp_path / f"out-{place}")[0].read_text()
        assert f"| {shown} |" in text


def test_seeds_patterns_histories_beams_and_logs_all_show(evaluated_runs: Any, tmp_path: Path) -> None:
    sweep = [{"num_beams": 20, "methods": {"hybrid": {"Recall@10": {"mean": 0.123, "low": 0.1, "high": 0.15}}}}]
    for seed in range(3):
        log(evaluated_runs.write("hybrid", seed, values(0.5, seed), both_histories=True, beam_sweep=sweep), 9.0, 5.0, 4.6)
        log(evaluated_runs.write("full", seed, values(0.3, seed), both_histories=True, pattern="SSS"), 9.0, 6.0, 5.6)
    page = report(["hybrid", "full"])
    text = page.markdown()
    means = [values(0.5, seed).mean() for seed in range(3)]
    cell = f"{np.mean(means):.4f} ± {np.std(means, ddof=1):.4f} ("
    assert f"| hybrid | 3 | {cell}" in text
    assert f"| hybrid | 3 | {np.mean(means) + 0.1:.4f} ± " in text, "the column with the history removed"
    difference = np.mean(means) - np.mean([values(0.3, seed).mean() for seed in range(3)])
    assert re.search(rf"\| full \| {np.mean(means):.4f} ± .* \| \{difference:+.4f} \|", text)
    assert "| 20 | 0.1230 (0.1000-0.1500) | - |" in text
    for wanted in ("| 0-9 | 30 |", "| 20+ | 40 |", "| 1+ | 87 |", "SGG x 2, bidirectional", "runs/full/1-2", "0" * 40):
        assert wanted in text, wanted
    figures = {block.name: block.svg for block in page.blocks if isinstance(block, Figure)}
    assert {"recall_at_10_kept", "ndcg_at_10_removed", "recall_at_10_by_history_length", "recall_at_10_by_pattern", "training"} <= set(
        figures
    )
    for name in ("recall_at_10_by_pattern", "training", "recall_at_10_by_history_length"):
        assert "hybrid" in figures[name] and "full" in figures[name], name
    assert "SSS x 2" in figures["recall_at_10_by_pattern"]


def test_datasets_stand_apart_and_unlike_runs_of_one_name_too(evaluated_runs: Any) -> None:
    evaluated_runs.write("films", 0, values(0.5, 0))
    evaluated_runs.write("films", 1, values(0.5, 1), pattern="SSS")
    evaluated_runs.write("books", 0, values(0.4, 0), dataset="books", content_hash="xyz")
    page = report(["films", "books"])
    text = page.markdown()
    assert "## films, test" in text and "## books, test" in text and "| films #2 | 1 |" in text
    names = [block.name for block in page.blocks if isinstance(block, Figure)]
    assert len(names) == len(set(names)) and {"0_films_recall_at_10_kept", "1_books_recall_at_10_kept"} <= set(names)


def test_no_name_of_a_run_is_lost_where_names_and_settings_divide_runs_differently(evaluated_runs: Any) -> None:
    def written(name: str, seed: int, pattern: str) -> Path:
        found: Path = evaluated_runs.write(name, seed, values(0.5, seed), pattern=pattern, started=pattern)
        return found

    shop = [written("shop", 0, "SGG"), written("shop", 1, "SGG")]
    sss = [written("shop_sss", 0, "SSS"), written("shop", 2, "SSS")]
    seeds = [written("shop.seed0", 0, "SG"), written("shop.seed1", 1, "SG")]
    others = [written("sggs.seed0", 0, "GG"), written("sggs.seed1", 1, "GG")]
    last = [written("shop", 3, "G")]
    for runs, expected in (
        ([*shop, *sss], ["shop", "shop + shop_sss"]),
        ([*sss, *shop], ["shop + shop_sss", "shop"]),
        ([*shop, *seeds, *others], ["shop", "shop.seed0 + shop.seed1", "sggs"]),
        ([*shop, *last], ["shop", "shop #2"]),
    ):
        (found,) = group_runs(runs)
        assert [group.name for group in found.groups] == expected


def test_without_matplotlib_the_error_says_how_to_install_it(evaluated_runs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = evaluated_runs.write("solo", 0, values(0.4, 0))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'gbla-rec\[report\]'"):
        report([run_dir])
