"""Every user that can be evaluated is evaluated once, on all ranks in as many steps."""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.config import MultiplyAdds, SplitConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import EvaluationSplit, evaluation_batches

PrepareFrame = Callable[..., PreparedDataset]
SPLITS = st.sampled_from(["validation", "test", "next"])
Row = tuple[list[int], list[int], list[int], list[int]]


@pytest.fixture(scope="module")
def dataset(prepare_frame: PrepareFrame, serial_log: Callable[..., pl.DataFrame]) -> PreparedDataset:
    """Ties give some users no validation target, and some no target at all."""
    frame = serial_log([1, 2, 3, 5, 60, 17, 1, 30, 8, 4, 25, 3, 9, 9, 9], events_per_second=2)
    prepared = prepare_frame(frame, context_columns=("action",), max_events_per_shard=40, split=SplitConfig(num_targets=2))
    # hundreds of passes over tiny shards need not read each again
    prepared.read_shard = functools.cache(prepared.read_shard)  # type: ignore[method-assign]
    prepared.read_lengths = functools.cache(prepared.read_lengths)  # type: ignore[method-assign]
    return prepared


def expected_rows(dataset: PreparedDataset, split: EvaluationSplit, max_length: int) -> dict[int, Row]:
    result = {}
    user_ids = [user_id for shard in dataset.iterate_shards() for user_id in shard.user_ids]
    for row, history in enumerate(map(dataset.history, user_ids)):
        end = history.test_begin if split == "validation" else len(history.items)
        begin = {"validation": history.validation_begin, "test": history.test_begin, "next": end}[split]
        if begin > 0 and (end > begin or split == "next"):
            seen, targets = history.items[:begin].tolist(), history.items[begin:end].tolist()
            result[row] = (seen[-max_length:], targets, seen, history.context["action"][:begin].tolist()[-max_length:])
    return result


@given(
    split=SPLITS,
    tokens=st.sampled_from([1, 10, 35, 1000]),
    users=st.sampled_from([1, 2, None]),
    max_length=st.sampled_from([1, 7, 1000]),
    world_size=st.integers(1, 4),
)
def test_each_user_is_evaluated_once(
    dataset: PreparedDataset, split: EvaluationSplit, tokens: int, users: int | None, max_length: int, world_size: int
) -> None:
    sizes = {"tokens_per_batch": tokens, "users_per_batch": users, "max_history_length": max_length}
    ranks = [
        list(
            evaluation_batches(dataset, split, **sizes, rank=rank, world_size=world_size, context=["action"])  # type: ignore[arg-type]
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    found: dict[int, Row] = {}
    for step in zip(*ranks, strict=True):
        assert {batch.global_num_targets for batch in step} == {sum(len(batch.targets) for batch in step)}
        assert {batch.global_num_tokens for batch in step} == {sum(len(batch.items) for batch in step)}
        for batch in step:
            assert len(batch.user_rows) <= 1 or len(batch.items) <= tokens
            assert users is None or len(batch.user_rows) <= users
            for row, user in enumerate(batch.user_rows.tolist()):
                parts = [
                    (batch.items, batch.offsets),
                    (batch.targets, batch.target_offsets),
                    (batch.seen_items, batch.seen_offsets),
                    (batch.context["action"], batch.offsets),
                ]
                assert user not in found
                found[user] = tuple(values[offsets[row] : offsets[row + 1]].tolist() for values, offsets in parts)
            assert len(batch.offsets) == len(batch.target_offsets) == len(batch.seen_offsets) == len(batch.user_rows) + 1
            assert (batch.position, batch.next_position) == (None, None)
            assert not batch.token_keys.any()
            assert len(batch.token_keys) == len(batch.items)
    assert found == expected_rows(dataset, split, max_length)
    counts = {"validation": dataset.manifest.num_validation_users, "test": dataset.manifest.num_test_users, "next": 15}
    assert len(found) == counts[split]


@given(split=SPLITS, num_users=st.integers(1, 20), seed=st.integers(0, 9))
def test_a_sample_of_users_is_fixed_by_the_seed(dataset: PreparedDataset, split: EvaluationSplit, num_users: int, seed: int) -> None:
    def users(world_size: int) -> list[int]:
        ranks = [
            evaluation_batches(
                dataset, split, tokens_per_batch=20, max_history_length=9, rank=rank, world_size=world_size, num_users=num_users, seed=seed
            )
            for rank in range(world_size)
        ]
        return sorted(int(user) for batch in itertools.chain(*ranks) for user in batch.user_rows)

    everyone = expected_rows(dataset, split, 9)
    assert users(1) == users(3)
    assert len(users(1)) == min(num_users, len(everyone))
    assert set(users(1)) <= set(everyone)


@given(world_size=st.integers(2, 9), seed=st.integers(0, 99))
def test_batches_are_those_of_one_rank_and_no_step_waits_long(prepare_frame: PrepareFrame, world_size: int, seed: int) -> None:
    costs = MultiplyAdds(event=1.0, pair=0.5, target=3.0, target_event=0.0)
    lengths = SKEWED[seed % len(SKEWED)]
    data = skewed_dataset(prepare_frame, lengths)

    def batches(rank: int, world_size: int) -> list[tuple[tuple[int, ...], float]]:
        found = evaluation_batches(
            data, "test", tokens_per_batch=60, max_history_length=50, rank=rank, world_size=world_size, costs=costs, num_decoded=7
        )
        return [(tuple(batch.user_rows.tolist()), sum(costs.of(float(n), 7) for n in np.diff(batch.offsets))) for batch in found]

    ranks = [batches(rank, world_size) for rank in range(world_size)]
    alone = batches(0, 1)
    assert sorted(batch for rank in ranks for batch in rank if batch[0]) == sorted(alone)
    lockstep = sum(max(cost for _, cost in step) for step in zip(*ranks, strict=True))
    total, dearest = sum(cost for _, cost in alone), max(cost for _, cost in alone)
    # one window, in the order of cost: a step's dearest batch costs no more than the cheapest of the step before
    assert lockstep <= total / world_size + dearest


SKEWED = [np.random.default_rng(seed).choice([2, 3, 5, 8, 50], size=120, p=[0.3, 0.3, 0.2, 0.1, 0.1]).tolist() for seed in range(3)]


@functools.cache
def _skewed(prepare_frame: PrepareFrame, lengths: tuple[int, ...]) -> PreparedDataset:
    sequences = [list(range(length + 1)) for length in lengths]
    prepared = prepare_frame(pl.DataFrame({"user_id": range(len(lengths)), "items": sequences}), sequence_column="items")
    prepared.read_shard = functools.cache(prepared.read_shard)  # type: ignore[method-assign]
    prepared.read_lengths = functools.cache(prepared.read_lengths)  # type: ignore[method-assign]
    return prepared


def skewed_dataset(prepare_frame: PrepareFrame, lengths: list[int]) -> PreparedDataset:
    """Users of whom a tenth cost far more than the others, in one shard."""
    return _skewed(prepare_frame, tuple(lengths))


@pytest.mark.parametrize("world_size", [1, 2, 3, 16])
def test_a_rank_reads_no_shard_often(prepare_frame: PrepareFrame, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    sequences = [list(range(length + 1)) for length in SKEWED[0]]
    data = prepare_frame(pl.DataFrame({"user_id": range(120), "items": sequences}), sequence_column="items", max_events_per_shard=200)
    assert data.num_shards > 4
    read = data.read_shard
    reads: list[int] = []
    monkeypatch.setattr(data, "read_shard", lambda index, context: reads.append(index) or read(index, context))
    for rank in range(world_size):
        reads.clear()
        batches = evaluation_batches(data, "test", tokens_per_batch=1, max_history_length=9, rank=rank, world_size=world_size)
        num_own = sum(len(batch.user_rows) > 0 for batch in batches)
        # a window of batches may lie across two shards
        assert len(reads) <= min(num_own, 3 * data.num_shards), world_size


def test_samples_of_different_seeds_differ_and_every_user_is_drawn(dataset: PreparedDataset) -> None:
    def drawn(seed: int) -> int:
        (batch,) = evaluation_batches(dataset, "test", tokens_per_batch=20, max_history_length=9, num_users=1, seed=seed)
        return int(batch.user_rows[0])

    assert {drawn(seed) for seed in range(200)} == set(expected_rows(dataset, "test", 9))


def test_users_without_memory_are_left_out(prepare_frame: PrepareFrame) -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1, 2, 2, 3], "item_id": range(6), "timestamp": [0, 10, 20, 10, 20, 20]})
    data = prepare_frame(frame, split=SplitConfig(kind="temporal", validation_time=10, test_time=20))
    for split, expected in (("validation", [0]), ("test", [0, 1])):
        (batch,) = evaluation_batches(data, split, tokens_per_batch=99, max_history_length=99)  # type: ignore[arg-type]
        assert batch.user_rows.tolist() == expected


def test_a_split_without_users_is_refused(prepare_frame: PrepareFrame) -> None:
    short = prepare_frame(pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": [1, 2]}))
    with pytest.raises(ValueError, match="no user has test targets"):
        list(evaluation_batches(short, "test", tokens_per_batch=1, max_history_length=1))


@pytest.mark.parametrize("arguments", [{"rank": 2, "world_size": 2}, {"num_users": 0}, {"tokens_per_batch": 0}, {"context": ("nothing",)}])
def test_bad_arguments_are_refused(dataset: PreparedDataset, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"must|nothing"):
        list(evaluation_batches(dataset, "test", **{"tokens_per_batch": 9, "max_history_length": 9, **arguments}))  # type: ignore[arg-type]


def test_an_unknown_split_is_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="'validation', 'test', 'next'"):
        evaluation_batches(dataset, "train", tokens_per_batch=1, max_history_length=1)  # type: ignore[arg-type]


def test_items_are_indices_of_the_items_table(dataset: PreparedDataset) -> None:
    for batch in evaluation_batches(dataset, "test", tokens_per_batch=99, max_history_length=99):
        assert np.all(batch.items < dataset.manifest.num_items)
