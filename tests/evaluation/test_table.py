"""Every method, metric and interval appears in both renderings, and the best mean is marked."""

import io
import itertools
import re
from typing import Any

import pytest
from rich.console import Console

from gbla_rec.evaluation.table import results_markdown, results_tables

RESULTS: dict[str, Any] = {
    "dataset": {"name": "films"},
    "protocol": {"split": "test", "users": 1234, "candidates": 99},
    "methods": {
        "model": {"Recall@10": {"mean": 0.25, "low": 0.2, "high": 0.3}, "NDCG@10": {"mean": 0.125, "low": 0.1, "high": 0.15}},
        "most-popular": {
            "Recall@10": {
                "mean": 0.05,
                "low": 0.04,
                "high": 0.06,
                "first_minus_this": 0.2,
                "difference_low": 0.15,
                "difference_high": 0.25,
            },
            "NDCG@10": {"mean": 0.5, "low": 0.4, "high": 0.6}
            | {"first_minus_this": -0.375, "difference_low": -0.4, "difference_high": -0.3},
        },
    },
}


def printed(results: dict[str, Any], width: int) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width)
    for table in results_tables(results, console.width):
        console.print(table)
    return out.getvalue()


def test_the_terminal_table_shows_every_number() -> None:
    text = printed(RESULTS, 200)
    for part in (
        "films, test, 1,234 users, 99 candidates",
        "model",
        "most-popular",
        "0.2500 (0.2000-0.3000)",
        "0.5000 (0.4000-0.6000)",
        "NDCG@10",
    ):
        assert part in text


METRICS = [f"{name}@{cutoff}" for name in ("Recall", "NDCG") for cutoff in (5, 10, 1000)]
METHODS = ["a_run_of_a_long_name.seed0", "a_run_of_a_long_name.seed0 (generative)", "a_run_of_a_long_name.seed0 (item)"]
METHODS += ["most-popular", "item-kNN"]


def results_of(methods: list[str]) -> dict[str, Any]:
    """As an evaluation with everything leaves them; no two numbers are the same."""
    numbers = itertools.count(1)

    def cells() -> dict[str, Any]:
        return {name: {key: next(numbers) / 10_000 for key in ("mean", "low", "high")} for name in METRICS}

    return {
        "dataset": {"name": "films"},
        "protocol": {"split": "test", "users": 1234, "candidates": 99, "history": "kept", "joint_beams": 200, "beam_weight": 0.8},
        "scores": {"joint": methods[0], "generative": methods[1]},
        "methods": {method: cells() for method in methods},
        "slices": {},
        "other_history": {"history": "removed", "methods": {method: cells() for method in methods}, "slices": {}},
        "beam_sweep": [{"num_beams": beams, "methods": {methods[1]: cells()}} for beams in (10, 1000)],
    }


@pytest.mark.parametrize("width", [40, 79, 80, 100, 120, 240])
@pytest.mark.parametrize("num_methods", [2, 3, 5])
def test_a_narrow_terminal_shows_every_number_once(width: int, num_methods: int) -> None:
    results = results_of(METHODS[:num_methods])
    text = printed(results, width)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    shown = [
        found for column in (results, results["other_history"]) for metrics in column["methods"].values() for found in metrics.values()
    ]
    swept = [found for row in results["beam_sweep"] for found in row["methods"].values()]
    shown += [found[metric] for found in swept for metric in ("Recall@10", "NDCG@10")]
    for value in shown:
        for part in (f" {value['mean']:.4f} ", f"({value['low']:.4f}-{value['high']:.4f})"):
            assert text.count(part) == 1, part
    for baseline in METHODS[3:num_methods]:
        assert text.count(baseline) == 2
    # of each column; broken where the table is narrower
    assert "".join(re.findall(r"own\s+history\s+(\w+)", text)) == "keptremoved"


def test_columns_that_fit_stay_in_one_table_of_one_line_a_row() -> None:
    for width, lines in ((200, 1), (80, 2)):
        text = printed(results_of(METHODS[:3]) | {"other_history": None, "beam_sweep": []}, width)
        assert text.count("┏") == 1 and len(re.findall(r"0\.\d{4}-0\.\d{4}", text)) == 18
        between = text[text.index("Recall@5") : text.index("Recall@10")]
        assert between.count("\n") == (1 if lines == 1 else 3)


def test_a_sweep_without_beams_prints_no_table() -> None:
    results = results_of(METHODS[:2]) | {"scores": {"item": METHODS[0]}, "other_history": None}
    results["beam_sweep"] = [{"num_beams": 10, "methods": {}}]
    assert "numbers of beams" not in printed(results, 80)


def test_markdown_marks_the_best_and_lists_the_paired_differences():
    text = results_markdown(RESULTS)
    assert "| method | Recall@10 | NDCG@10 |\n|---|---:|---:|\n" in text
    assert "| model | **0.2500 (0.2000-0.3000)** | 0.1250 (0.1000-0.1500) |" in text
    assert "| most-popular | 0.0500 (0.0400-0.0600) | **0.5000 (0.4000-0.6000)** |" in text
    assert "- model minus most-popular, NDCG@10: -0.3750 [-0.4000, -0.3000]" in text


def test_results_that_are_no_table_are_refused():
    with pytest.raises(ValueError, match="at least one method"):
        list(results_tables({"methods": {}}, 80))
    with pytest.raises(ValueError, match="same metrics"):
        results_markdown({"methods": {"a": {"Recall@5": {}}, "b": {"Recall@10": {}}}})
