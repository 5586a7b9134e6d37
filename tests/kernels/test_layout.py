"""The jagged layout agrees with its row lengths, and refuses what is not one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gbla_kernels import JaggedLayout
from gbla_kernels.layout import CHUNK
from gbla_kernels.testing.inputs import NASTY_LENGTHS


@given(st.lists(st.one_of(st.sampled_from(NASTY_LENGTHS), st.integers(0, 200)), max_size=6))
def test_tables_describe_the_rows(lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(lengths)
    assert layout.offsets.diff().tolist() == lengths == layout.row_lengths
    assert torch.equal(layout.offsets_int32.long(), layout.offsets)
    assert layout.max_length == max(lengths, default=0)
    assert layout.rows.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert layout.positions.tolist() == [i for length in lengths for i in range(length)]
    chunks = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, CHUNK)]
    assert layout.chunk_rows.tolist() == [row for row, _ in chunks]
    assert layout.chunk_starts.tolist() == [int(layout.offsets[row]) + start for row, start in chunks]
    again = JaggedLayout.from_offsets(layout.offsets)
    assert torch.equal(again.chunk_starts, layout.chunk_starts)


def test_bad_lengths_and_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths must not be negative, got -1 in row 1"):
        JaggedLayout.from_lengths([2, -1])
    with pytest.raises(ValueError, match="start at 0"):
        JaggedLayout.from_offsets(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="integers on the CPU"):
        JaggedLayout.from_lengths(torch.tensor([1.5]))
