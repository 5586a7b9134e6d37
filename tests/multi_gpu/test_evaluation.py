"""Evaluation and beam search shared by GPUs: the metrics of one, to the last digit, in less time."""

import json
from typing import Any

import pytest

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(480)]


@pytest.mark.parametrize(("num_ranks", "ranks"), [(2, "on_two"), (4, "on_four")])
def test_ranks_find_the_metrics_of_one_to_the_last_digit(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], on_one_after_two: Any, num_ranks: int, ranks: str
) -> None:
    one, several = on_one_after_two["evaluation"], request.getfixturevalue(ranks)["evaluation"]
    assert several["results"] == one["results"]
    results = json.loads(one["results"])
    assert 0 < results["methods"]["bf16_row_wise_2"]["Recall@20"]["mean"] < 1
    with capsys.disabled():
        for number, timed in ((1, one), (num_ranks, several)):
            print(
                f"\nevaluation of {results['protocol']['users']} users on {number} rank(s): {timed['seconds']:.2f} s, "
                f"of which beam search over the test users {timed['beam_search_seconds']:.2f} s",
                end="",
            )
        print()
