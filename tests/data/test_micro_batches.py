"""A global batch is cut into micro batches before ranks share it: the same cut for any number of ranks, even in size and cost."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gbla_rec.config import EncoderConfig, ModelConfig, SplitConfig, StreamConfig, with_sample_costs
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.histories import HistoryBatch, sample_costs, split_by_cost
from gbla_rec.data.micro_batches import micro_batch_of_rows
from gbla_rec.data.stream import TrainingStream

MOSTLY_LONG = st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**40)), min_size=1, max_size=40)


def micro_batch_sizes(sizes: np.ndarray, num_micro_batches: int) -> tuple[np.ndarray, np.ndarray]:
    """Micro batch of each row, and the sum of ``sizes`` in each."""
    parts = micro_batch_of_rows(sizes - 1, np.ones_like(sizes), num_micro_batches)
    return parts, np.array([sizes[parts == part].sum() for part in range(num_micro_batches)])


@given(lengths=MOSTLY_LONG, num_micro_batches=st.integers(1, 9))
@example(lengths=[5, 5, 5, 5], num_micro_batches=4)
@example(lengths=[1000, 1, 1, 1], num_micro_batches=4)
@example(lengths=[2**40, 0], num_micro_batches=5)
def test_micro_batches_are_even_and_longest_first(lengths: list[int], num_micro_batches: int) -> None:
    sizes = np.array(lengths) + 1
    parts, sums = micro_batch_sizes(sizes, num_micro_batches)
    assert parts.dtype == np.int64 and len(parts) == len(lengths)
    counts = np.bincount(parts, minlength=num_micro_batches)
    assert len(counts) == num_micro_batches
    # none is empty where there are enough rows, else the first have one row each
    assert np.count_nonzero(counts) == min(len(lengths), num_micro_batches) and counts[: len(lengths)].all()
    for micro_batch in range(num_micro_batches):
        own = sizes[parts == micro_batch]
        # one row is never divided; half a row more than an even share of what is left
        share = sums[micro_batch:].sum() / (num_micro_batches - micro_batch)
        assert len(own) <= 1 or own.sum() <= share + own.min() / 2 + 1
        assert not len(own) or (sizes[parts > micro_batch] <= own.min()).all()
    # ties go to the row that came first
    for one, other in itertools.pairwise(np.argsort(-sizes, kind="stable")):
        assert parts[one] <= parts[other]


def test_a_giant_leaves_an_even_cut_to_the_rest() -> None:
    _, sums = micro_batch_sizes(np.array([10] * 30 + [100_000] + [10] * 30), 4)
    assert sums.tolist() == [100_000, 200, 200, 200]


@pytest.fixture(scope="module")
def dataset(prepare_frame: Callable[..., PreparedDataset], serial_log: Callable[..., Any]) -> PreparedDataset:
    frame = serial_log([1, 2, 3, 5, 60, 17, 1, 30, 8, 4, 25, 3], events_per_second=2)
    return prepare_frame(frame, context_columns=("action",), max_events_per_shard=40, split=SplitConfig(num_targets=1))


def rows(batch: HistoryBatch) -> Iterator[tuple[Any, ...]]:
    """Each sample with all that belongs to it."""
    for row, user in enumerate(batch.user_rows):
        events, targets = slice(*batch.offsets[row : row + 2]), slice(*batch.target_offsets[row : row + 2])
        arrays = (batch.items[events], batch.token_keys[events], batch.context["action"][events], batch.targets[targets])
        yield (int(user), *(tuple(array.tolist()) for array in arrays))


@given(
    tokens_per_batch=st.sampled_from([1, 7, 40, 300]),
    quadratic_cost=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 5),
    num_micro_batches=st.integers(1, 5),
    world_size=st.sampled_from([2, 3, 5]),
)
def test_any_number_of_ranks_shares_the_same_micro_batches(
    dataset: PreparedDataset, tokens_per_batch: int, quadratic_cost: float, seed: int, num_micro_batches: int, world_size: int
) -> None:
    config = StreamConfig(
        tokens_per_batch=tokens_per_batch,
        targets_per_cut=3,
        oversized="own_batch",
        linear_cost=1.0,
        quadratic_cost=quadratic_cost,
    )

    def stream(rank: int, ranks: int, parts: int) -> TrainingStream:
        return TrainingStream(dataset, config, seed=seed, rank=rank, world_size=ranks, num_micro_batches=parts, context=["action"])

    whole = itertools.islice(stream(0, 1, 1).batches(), 4)
    alone = itertools.islice(stream(0, 1, num_micro_batches).steps(), 4)
    ranks = (itertools.islice(stream(rank, world_size, num_micro_batches).steps(), 4) for rank in range(world_size))
    for batch, of_one, *of_ranks in zip(whole, alone, *ranks, strict=True):
        assert sorted(row for part in of_one for row in rows(part)) == sorted(rows(batch))
        for micro_batch, *shares in zip(of_one, *of_ranks, strict=True):
            assert sorted(row for share in shares for row in rows(share)) == sorted(rows(micro_batch))
            sizes = [np.diff(share.offsets) for share in shares]
            loads = [(size * (1 + quadratic_cost * size)).sum() for size in sizes]
            # no rank could shed its last sample and gain
            assert max(loads) - min(loads) <= max((size * (1 + quadratic_cost * size)).max(initial=0) for size in sizes)
            for part in (micro_batch, *shares):
                assert (part.position, part.next_position) == (batch.position, batch.next_position)
                assert (part.global_num_targets, part.global_num_tokens) == (len(batch.targets), len(batch.items))


def test_the_rank_of_a_giant_has_its_share_of_the_next_micro_batch(prepare_frame: Callable[..., PreparedDataset]) -> None:
    lengths = [400] + [24] * 20
    items = [[1000 * user + event for event in range(length)] for user, length in enumerate(lengths)]
    data = prepare_frame(pl.DataFrame({"user_id": range(len(lengths)), "items": items}), sequence_column="items")
    # a batch is an epoch
    config = StreamConfig(tokens_per_batch=800, targets_per_cut=2, cuts="newest", linear_cost=1.0, quadratic_cost=1.0)
    streams = [TrainingStream(data, config, seed=1, rank=rank, world_size=2, num_micro_batches=2) for rank in range(2)]
    first, second = zip(*(next(stream.steps()) for stream in streams), strict=True)
    assert first[0].user_rows.tolist() == [0]
    # by the whole batch, the giant outweighs all others
    assert sorted(len(share.user_rows) for share in second) == [9, 10]


def test_a_batch_is_its_micro_batches_joined(dataset: PreparedDataset) -> None:
    config = StreamConfig(tokens_per_batch=60, linear_cost=1.0, quadratic_cost=0.1)
    stream = TrainingStream(dataset, config, seed=1, rank=1, world_size=2, num_micro_batches=3, context=["action"])
    for joined, parts in itertools.islice(zip(stream.batches(), stream.steps(), strict=False), 5):
        assert list(rows(joined)) == [row for part in parts for row in rows(part)]
        assert (joined.position, joined.next_position) == (parts[0].position, parts[0].next_position)
        assert joined.global_num_targets == parts[0].global_num_targets
    with pytest.raises(ValueError, match="num_micro_batches must be positive, got 0"):
        TrainingStream(dataset, config, seed=1, num_micro_batches=0)


@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(["SGG", "SSS"]), world_size=st.sampled_from([4, 16]))
def test_zipf_lengths_fill_the_ranks_of_every_micro_batch(seed: int, pattern: str, world_size: int) -> None:
    longest, num_micro_batches, tokens_per_rank = 8_192, 4, 65_536
    costs_of = with_sample_costs(StreamConfig(max_history_length=longest), ModelConfig(encoder=EncoderConfig(pattern=pattern)), (256,) * 4)
    lengths = np.floor((1 - np.random.default_rng(seed).random(world_size * tokens_per_rank) * (1 - longest**-0.5)) ** -2).astype(np.int64)
    lengths = lengths[np.cumsum(lengths) <= world_size * tokens_per_rank]
    targets = np.minimum(lengths, 32)
    costs = sample_costs(lengths, targets, costs_of)
    parts = micro_batch_of_rows(lengths, targets, num_micro_batches)
    slowest, most_tokens = 0.0, 0.0
    for micro_batch in range(num_micro_batches):
        own = parts == micro_batch
        ranks = split_by_cost(costs[own], world_size)
        slowest += np.bincount(ranks, weights=costs[own], minlength=world_size).max()
        most_tokens = max(most_tokens, np.bincount(ranks, weights=lengths[own], minlength=world_size).max())
    # the longest history is half of a rank's share of a micro batch
    assert slowest <= 1.1 * costs.sum() / world_size
    assert most_tokens <= 1.4 * tokens_per_rank / num_micro_batches
