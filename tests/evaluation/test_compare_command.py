"""``gbla-rec compare``: what is asked of the same runs a second time does not replace the first answer."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_apps.compare import main


def test_comparisons_of_other_scores_and_histories_lie_apart(
    evaluated_runs: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        evaluated_runs.write(name, 0, np.linspace(0, 1, 40), both_histories=True)
    for options in ([], ["--history", "removed"], ["--score", "item-kNN"], ["--b-score", "item-kNN"]):
        main(["a", "b", "--samples", "20", *options])
    names = ["a.item-kNN_vs_b.item-kNN", "a_vs_b", "a_vs_b.item-kNN", "a_vs_b_removed"]
    assert sorted(path.name for path in (workspace / "comparisons").iterdir()) == names
    assert all((workspace / "comparisons" / name / "comparison.json").is_file() for name in names)
