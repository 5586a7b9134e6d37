"""A test of what tests are given: the strategy of jagged batches draws the nasty ones, and memory is poisoned where a test asks for it."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT, TINY_ROW_LIMITS
from gbla_kernels.testing.inputs import BLOCK, JaggedLengths

Batch = list[int]
NASTY: dict[str, Callable[[Batch], bool]] = {
    "an empty row": lambda lengths: 0 in lengths,
    "a row of one token": lambda lengths: 1 in lengths,
    "no token at all": lambda lengths: sum(lengths) == 0,
    "one row": lambda lengths: len(lengths) == 1,
    "an empty row between others": lambda lengths: any(length == 0 for length in lengths[1:-1]) and lengths[0] > 0 < lengths[-1],
    "an empty row at the end": lambda lengths: len(lengths) > 1 and lengths[-1] == 0 < sum(lengths),
    **{
        f"a row of {edge} tokens": lambda lengths, edge=edge: edge in lengths  # type: ignore[misc]
        for block in (TINY_ROW_LIMITS[0], BLOCK, SHORT_LIMIT, SPLIT)
        for edge in (block - 1, block, block + 1)
    },
    "a prime": lambda lengths: any(length in (31, 61, 67, 131) for length in lengths),
    "one giant among many tiny": lambda lengths: max(lengths) >= SPLIT - 1 and len(lengths) > 5 and sorted(lengths)[-2] <= 3,
}


def test_the_strategy_of_jagged_batches_finds_the_nasty_ones() -> None:
    missing = dict(NASTY)

    @given(st.from_type(JaggedLengths))
    @settings(max_examples=400)
    def look(lengths: Batch) -> None:
        for name in [name for name, is_nasty in missing.items() if is_nasty(lengths)]:
            del missing[name]

    look()
    assert not missing, f"never drawn: {', '.join(missing)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_nobody_wrote_is_not_a_number(poisoned_memory: None, dtype: torch.dtype) -> None:
    like = torch.zeros(5, 3, dtype=dtype)
    for memory in (torch.empty(5, 3, dtype=dtype), torch.empty_like(like), like.new_empty(5, 3)):
        assert memory.isnan().all()
    assert (torch.empty(4, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
