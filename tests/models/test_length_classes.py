"""Classes of row lengths: each row is in exactly one, and the launches stay small."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st

from gbla_kernels import JaggedLayout
from gbla_rec.models.length_classes import BLOCK, REUSE_RATIO, KnownShapes, bucket, class_rows, length_classes

lengths_strategy = st.lists(st.integers(0, 3) | st.integers(0, 600) | st.sampled_from((128, 129, 2048, 131_072)), min_size=0, max_size=12)


def blocks(num_rows: int, max_length: int) -> int:
    return num_rows * (max_length // BLOCK)


@given(lengths=lengths_strategy)
@example(lengths=[])
@example(lengths=[0, 0])
@example(lengths=[9] * 4096 + [131_072])
def test_every_row_that_is_not_empty_is_in_exactly_one_class(lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(lengths)
    found = []
    for one in class_rows(layout.offsets, layout.offsets_cpu):
        assert int(one.lengths.max()) <= one.max_length
        assert one.starts.numel() == one.num_rows + 1
        assert bool((one.starts.diff() >= 0).all())
        found += [(start, length) for start, length in zip(one.starts.tolist(), one.lengths.tolist(), strict=False) if length]
    assert sorted(found) == [(start, length) for start, length in zip(layout.offsets.tolist(), lengths, strict=False) if length]


def test_a_long_row_among_many_short_ones_launches_no_flood_of_empty_blocks() -> None:
    classes = length_classes(torch.tensor([131_072] + [9] * 4096))
    assert [(one.num_rows, one.longest) for one in classes] == [(1, 131_072), (4096, 9)]
    spread = torch.randint(1, 20_000, (3000,), generator=torch.Generator().manual_seed(0))
    launched = sum(blocks(bucket(one.num_rows), bucket(one.longest)) for one in length_classes(spread))
    assert launched < 4 * int(((spread + BLOCK - 1) // BLOCK).sum())


def test_rows_of_similar_length_are_one_launch() -> None:
    for lengths in ([2048] * 32, [32_768], [8192, 1, 40, 700], [1000, 900, 500, 130, 7]):
        assert len(length_classes(torch.tensor(lengths))) == 1


def test_classes_are_made_once_per_batch() -> None:
    layout = JaggedLayout.from_lengths([3, 900])
    assert class_rows(layout.offsets, layout.offsets_cpu) is class_rows(layout.offsets, layout.offsets_cpu)


def test_buckets_are_few_and_close() -> None:
    assert [bucket(size) for size in (1, 2, 3, 4, 5, 13, 129)] == [1, 2, 4, 4, 8, 16, 256]
    sizes = range(1, 5000)
    assert all(size <= bucket(size) < 2 * size for size in sizes)
    assert len({bucket(size) for size in sizes}) == 14


@given(shapes=st.lists(st.tuples(st.integers(0, 8).map(lambda n: 2**n), st.integers(7, 15).map(lambda n: 2**n)), max_size=30))
@example(shapes=[(4, 2048), (2, 1024), (1, 1024), (8, 4096)])
def test_a_known_shape_is_taken_where_it_holds_the_rows_without_many_blocks_more(shapes: list[tuple[int, int]]) -> None:
    known, met = KnownShapes(), set[tuple[int, int]]()
    for rows, length in shapes:
        taken = known.fit(rows, length)
        assert taken[0] >= rows and taken[1] >= length and taken[0] * taken[1] <= REUSE_RATIO * rows * length
        could = [one for one in met if one[0] >= rows and one[1] >= length and one[0] * one[1] <= REUSE_RATIO * rows * length]
        assert taken in could if could else taken == (rows, length)
        assert all(taken[0] * taken[1] <= one[0] * one[1] for one in could)
        met.add(taken)
