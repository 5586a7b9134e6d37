"""Every method, metric and interval appears in both renderings, and the best mean is marked."""

import io

import pytest
from rich.console import Console

from gbla_rec.evaluation.table import results_markdown, results_table

RESULTS = {
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


def test_the_terminal_table_shows_every_number():
    out = io.StringIO()
    Console(file=out, width=200).print(results_table(RESULTS))
    for text in (
        "films, test, 1,234 users, 99 candidates",
        "model",
        "most-popular",
        "0.2500 (0.2000-0.3000)",
        "0.5000 (0.4000-0.6000)",
        "NDCG@10",
    ):
        assert text in out.getvalue()


def test_markdown_marks_the_best_and_lists_the_paired_differences():
    text = results_markdown(RESULTS)
    assert "| method | Recall@10 | NDCG@10 |\n|---|---:|---:|\n" in text
    assert "| model | **0.2500 (0.2000-0.3000)** | 0.1250 (0.1000-0.1500) |" in text
    assert "| most-popular | 0.0500 (0.0400-0.0600) | **0.5000 (0.4000-0.6000)** |" in text
    assert "- model minus most-popular, NDCG@10: -0.3750 [-0.4000, -0.3000]" in text


def test_results_that_are_no_table_are_refused():
    with pytest.raises(ValueError, match="at least one method"):
        results_table({"methods": {}})
    with pytest.raises(ValueError, match="same metrics"):
        results_markdown({"methods": {"a": {"Recall@5": {}}, "b": {"Recall@10": {}}}})
