"""The jagged layout agrees with its row lengths, its tables cover every token once, and it refuses what is not a layout."""

import itertools
from bisect import bisect_left
from collections import Counter

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

from gbla_kernels import JaggedLayout
from gbla_kernels.row_splits import MAX_SPLITS, SHORT_LIMIT, SPLIT, SPLIT_MULTIPLE, TINY_ROW_LIMITS, RowSplits, split_lengths
from gbla_kernels.testing.inputs import JaggedLengths

LONG = (MAX_SPLITS * SPLIT - 1, MAX_SPLITS * SPLIT, MAX_SPLITS * SPLIT + 1, 131_072)
lengths_or_none = st.just([]) | st.from_type(JaggedLengths)
short_limits = st.sampled_from([0, 1, 64, SHORT_LIMIT, SPLIT])


@given(lengths_or_none)
def test_layout_describes_the_rows(lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(lengths)
    assert layout.offsets.diff().tolist() == lengths == layout.row_lengths
    assert torch.equal(layout.offsets_int32.long(), layout.offsets)
    assert layout.max_length == max(lengths, default=0)
    assert layout.rows.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]
    assert layout.positions.tolist() == [i for length in lengths for i in range(length)]
    again = JaggedLayout.from_offsets(layout.offsets)
    for table, other in zip(layout.row_splits.tensors(), again.row_splits.tensors(), strict=True):
        assert torch.equal(table, other)


def used(table: torch.Tensor) -> list[list[int]]:
    """Entries with tokens, slot first where there is one."""
    return [entry for entry in table.tolist() if entry[-2] < entry[-1]]


@given(lengths=lengths_or_none, short_limit=short_limits)
@example(lengths=[3, *LONG, 0], short_limit=SPLIT)
@example(lengths=[3, *LONG, 0], short_limit=0)
def test_every_token_is_covered_once_by_a_piece_of_its_own_row(lengths: list[int], short_limit: int) -> None:
    splits = RowSplits.from_lengths(torch.tensor(lengths, dtype=torch.int64), short_limit=short_limit)
    bounds = [0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()]
    rows = list(itertools.pairwise(bounds))
    short_rows = [[start, stop] for start, stop in rows if 0 < stop - start <= short_limit]
    assert used(splits.short_rows) == sorted(short_rows, key=lambda row: bisect_left(TINY_ROW_LIMITS, row[1] - row[0]))
    long_rows = [(start, stop) for start, stop in rows if stop - start > short_limit]
    pieces = used(splits.splits)
    for slot, (start, stop) in enumerate(long_rows):
        first, last = splits.slot_offsets[slot : slot + 2].tolist()
        own = pieces[first:last]
        assert all(piece[0] == slot for piece in own)
        edges = [start, *(piece[2] for piece in own)]
        assert [piece[1] for piece in own] == edges[:-1] and edges[-1] == stop, "splits lie side by side, from start to stop"
    counts = Counter(piece[0] for piece in pieces)
    assert counts.keys() == set(range(len(long_rows)))
    assert (splits.fewest_splits, splits.most_splits) == (min(counts.values(), default=0), max(counts.values(), default=0))
    assert splits.has_short == bool(used(splits.short_rows)) and splits.has_splits == bool(pieces)


@given(lengths=lengths_or_none, short_limit=short_limits)
@example(lengths=[3, *LONG, 0], short_limit=SPLIT)
@example(lengths=[0, 0], short_limit=0)
def test_tables_made_on_the_device_do_the_same_work(lengths: list[int], short_limit: int) -> None:
    row_lengths = torch.tensor(lengths, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), row_lengths.cumsum(0)])
    exact = RowSplits.from_lengths(row_lengths, short_limit=short_limit)
    bound = RowSplits.on_device(offsets, int(offsets[-1]), short_limit=short_limit)
    assert used(bound.short_rows) == sorted(used(exact.short_rows))
    assert used(bound.splits) == used(exact.splits)
    num_slots = len({piece[0] for piece in used(exact.splits)})
    assert bound.slot_offsets[: num_slots + 1].tolist() == exact.slot_offsets[: num_slots + 1].tolist()
    # slots that no row has are empty
    assert bool((bound.slot_offsets[num_slots:] == bound.slot_offsets[num_slots]).all())
    assert bound.has_short >= exact.has_short and bound.has_splits >= exact.has_splits
    assert bound.most_splits >= exact.most_splits and bound.fewest_splits <= max(exact.fewest_splits, 1)


@given(lengths=lengths_or_none, short_limit=short_limits)
@example(lengths=[0], short_limit=0)
def test_tables_have_two_entries_at_least_and_unused_entries_have_no_tokens(lengths: list[int], short_limit: int) -> None:
    row_lengths = torch.tensor(lengths, dtype=torch.int64)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), row_lengths.cumsum(0)])
    for splits in (
        RowSplits.from_lengths(row_lengths, short_limit=short_limit),
        RowSplits.on_device(offsets, int(offsets[-1]), short_limit=short_limit),
    ):
        assert min(len(splits.short_rows), len(splits.splits), len(splits.slot_offsets) - 1) >= 2
        assert bool((splits.slot_offsets.diff() >= 0).all())
        for table in (splits.short_rows[:, -2:], splits.splits[:, -2:]):
            assert bool((table[:, 0] <= table[:, 1]).all())
        covered = sum(int(table[:, -2:].diff().sum()) for table in (splits.short_rows, splits.splits))
        assert covered == int(offsets[-1])
        assert bool((splits.splits[:, 0] < len(splits.slot_offsets) - 1).all()), "a slot past the states"


@given(st.integers(1, 300_000) | st.sampled_from(LONG))
def test_splits_of_a_row_depend_on_its_length_alone_and_are_few(length: int) -> None:
    size = int(split_lengths(torch.tensor([length]))[0])
    assert size % SPLIT_MULTIPLE == 0 and size >= SPLIT
    assert -(-length // size) <= MAX_SPLITS
    neighbours = split_lengths(torch.tensor([5, length, 200_000]))
    assert int(neighbours[1]) == size


def test_bad_lengths_and_offsets_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths must not be negative, got -1 in row 1"):
        JaggedLayout.from_lengths([2, -1])
    with pytest.raises(ValueError, match="start at 0"):
        JaggedLayout.from_offsets(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"offsets must be a tensor of integers, got list \[0, 3\]; torch.as_tensor makes one"):
        JaggedLayout.from_offsets([0, 3])  # type: ignore[arg-type]
    # 1.5 would be rounded
    with pytest.raises(ValueError, match=r"offsets must be a tensor of integers, got torch\.float32"):
        JaggedLayout.from_offsets(torch.tensor([0, 1.5, 3]))
    with pytest.raises(ValueError, match="integers on the CPU"):
        JaggedLayout.from_lengths(torch.tensor([1.5]))


def test_tables_made_on_the_device_are_one_graph_whatever_the_rows() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()

    def tables(offsets: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return RowSplits.on_device(offsets, tokens.shape[0]).tensors()

    compiled = torch.compile(tables, backend=counter, fullgraph=True, dynamic=True)
    for lengths in ([5, 700, 768, 2], [2000], [3, 5000], [40, 9, 17], [SPLIT, 0], [SPLIT + 1], [0, 0, 2]):
        offsets, tokens = torch.tensor([0, *itertools.accumulate(lengths)]), torch.zeros(sum(lengths))
        for actual, expected in zip(compiled(offsets, tokens), tables(offsets, tokens), strict=True):
            assert torch.equal(actual, expected)
    assert counter.frame_count == 1


def test_splits_are_longer_where_rows_have_enough_of_them() -> None:
    lengths = torch.tensor([1, 1536, 1537, 16_384, 16_385, 65_536, 65_537, 131_072])
    assert split_lengths(lengths).tolist() == [256, 256, 512, 512, 1024, 1024, 1152, 2048]
