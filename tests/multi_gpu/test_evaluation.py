"""Evaluation and beam search shared by GPUs: the metrics of one, to the last digit (``benchmarks/evaluation_ranks.py`` has the times)."""

from typing import Any

import pytest

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(480)]


@pytest.mark.parametrize("ranks", ["on_two", "on_four"])
def test_ranks_find_the_metrics_of_one_to_the_last_digit(request: pytest.FixtureRequest, on_one_after_two: Any, ranks: str) -> None:
    one, several = on_one_after_two["evaluation"]["results"], request.getfixturevalue(ranks)["evaluation"]["results"]
    assert several == one
    assert 0 < one["methods"]["bf16_row_wise_2"]["Recall@20"]["mean"] < 1
