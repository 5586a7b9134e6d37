"""On GPUs too, training is world-size free: any number of ranks, any sharding, stopped and resumed or not, gives one loss curve."""

from typing import Any

import pytest

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(480)]
FP32_TOLERANCE = 2e-5
"""Relative, of losses: products of other sizes are summed in another order, over steps of a growing difference."""
BF16_TOLERANCE = 1e-2
"""Relative, of losses: bf16 rounds to 2^-9, and what differs before rounding may be rounded apart."""
GRADIENT_FACTOR = 20
"""By how much gradient norms and the change of the tables may differ more than losses."""


def agree(run: dict[str, Any], reference: dict[str, Any], tolerance: float) -> None:
    assert run["steps"] == reference["steps"] == list(range(1, 17))
    assert run["losses"] == pytest.approx(reference["losses"], rel=tolerance)
    assert run["nll"] == pytest.approx(reference["nll"], rel=tolerance)
    assert run["gradient_norms"] == pytest.approx(reference["gradient_norms"], rel=GRADIENT_FACTOR * tolerance)
    assert run["table_change"] == pytest.approx(reference["table_change"], rel=GRADIENT_FACTOR * tolerance)


@pytest.mark.parametrize("sharding", ["row_wise", "table_wise"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", ["on_two", "on_four"])
def test_ranks_see_the_curve_of_one(request: pytest.FixtureRequest, alone: Any, ranks: str, precision: str, sharding: str) -> None:
    run = request.getfixturevalue(ranks)[f"{precision} {sharding}"]
    assert f"item_hash_0: {sharding}, fused" in run["plan"] and ("rank:1/" in run["plan"])
    # it learns
    assert run["losses"][-1] < 0.95 * run["losses"][0]
    agree(run, alone[precision], FP32_TOLERANCE if precision == "fp32" else BF16_TOLERANCE)


@pytest.mark.parametrize("ranks", ["on_two", "on_four"])
def test_column_shards_keep_their_curve_wherever_they_lie(request: pytest.FixtureRequest, alone: Any, ranks: str) -> None:
    # the number of column shards is fixed by the width, each has a moment of its own
    run = request.getfixturevalue(ranks)["fp32 column_wise"]
    assert run["plan"].count("1,024 x 128 on rank:") == alone["column_wise"]["plan"].count("1,024 x 128 on rank:") == 4
    agree(run, alone["column_wise"], FP32_TOLERANCE)


@pytest.mark.parametrize(
    ("name", "ranks"), [("1 to 2", "on_two"), ("2 to 1", "on_one_after_two"), ("2 to 4", "on_four")], ids=["1-2", "2-1", "2-4"]
)
def test_a_run_goes_on_exactly_on_another_number_of_gpus(request: pytest.FixtureRequest, alone: Any, name: str, ranks: str) -> None:
    agree(request.getfixturevalue(ranks)[name], alone["fp32"], FP32_TOLERANCE)
