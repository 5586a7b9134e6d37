"""Laws of the training stream: one sequence for any number of ranks, resumable anywhere, and no look at the future."""

import dataclasses
import functools
import gc
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gbla_rec.config import SplitConfig, StreamConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.data.shard_files import HistoryShard
from gbla_rec.data.stream import StreamPosition, TrainingStream, iterate_train_items

PrepareFrame = Callable[..., PreparedDataset]
SerialLog = Callable[..., pl.DataFrame]
ARRAYS = ("user_rows", "items", "offsets", "targets", "target_offsets", "token_keys", "seen_items", "seen_offsets")

CONFIGS = st.builds(
    StreamConfig,
    tokens_per_batch=st.sampled_from([1, 7, 40, 100]),
    max_history_length=st.sampled_from([3, 9, 1000]),
    targets_per_cut=st.integers(1, 4),
    max_cuts_per_history=st.sampled_from([1, 3, 64]),
    min_history_length=st.integers(0, 3),
    oversized=st.just("own_batch"),
    linear_cost=st.just(1.0),
    quadratic_cost=st.sampled_from([0.0, 1.0]),
    target_cost=st.sampled_from([None, 3.0]),
    cuts=st.sampled_from(["everywhere", "newest"]),
)


@pytest.fixture(scope="module")
def dataset(prepare_frame: PrepareFrame, serial_log: SerialLog) -> PreparedDataset:
    """Histories of 1 to 60 events with many ties, in several shards; some have no trainable event."""
    frame = serial_log([1, 2, 3, 5, 60, 17, 1, 30, 8, 4, 25, 3], events_per_second=2)
    return in_memory(prepare_frame(frame, context_columns=("action",), max_events_per_shard=40, split=SplitConfig(num_targets=1)))


@pytest.fixture(scope="module")
def temporal_dataset(prepare_frame: PrepareFrame, serial_log: SerialLog) -> PreparedDataset:
    """A split in time leaves some users without any training event."""
    late = serial_log([5, 9], seed=1).with_columns(pl.col("user_id") + 100, pl.col("item_id") + 1000, pl.col("timestamp") + 100)
    frame = pl.concat([serial_log([30, 20, 10, 5]), late])
    return in_memory(prepare_frame(frame, max_events_per_shard=12, split=SplitConfig(kind="temporal", validation_time=15, test_time=102)))


def in_memory(dataset: PreparedDataset) -> PreparedDataset:
    """Hundreds of passes over tiny shards need not read each again."""
    dataset.read_shard = functools.cache(dataset.read_shard)  # type: ignore[method-assign]
    return dataset


def take(stream: TrainingStream, count: int, position: StreamPosition = StreamPosition()) -> list[HistoryBatch]:
    return list(itertools.islice(stream.batches(position), count))


def rows(batch: HistoryBatch) -> Iterator[tuple[Any, ...]]:
    """Each sample with all that belongs to it."""
    for row, user in enumerate(batch.user_rows):
        events = slice(int(batch.offsets[row]), int(batch.offsets[row + 1]))
        targets = slice(int(batch.target_offsets[row]), int(batch.target_offsets[row + 1]))
        contexts = [tuple(codes[events].tolist()) for codes in batch.context.values()]
        yield (
            int(user),
            tuple(batch.items[events].tolist()),
            tuple(batch.targets[targets].tolist()),
            *contexts,
            tuple(batch.token_keys[events].tolist()),
        )


def epoch_rows(stream: TrainingStream, epoch: int) -> list[tuple[Any, ...]]:
    """All samples of an epoch; works for batches of one sample."""
    found = []
    for batch in stream.batches(StreamPosition(epoch)):
        assert batch.position is not None
        if batch.position.epoch != epoch:
            break
        found += list(rows(batch))
    return found


def assert_equal(one: HistoryBatch, other: HistoryBatch) -> None:
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
        assert getattr(one, name).dtype == np.int64
    assert one.context.keys() == other.context.keys()
    for name, codes in one.context.items():
        np.testing.assert_array_equal(codes, other.context[name])
    assert (one.global_num_targets, one.global_num_tokens) == (other.global_num_targets, other.global_num_tokens)
    assert (one.position, one.next_position) == (other.position, other.next_position)


@given(config=CONFIGS, seed=st.integers(0, 5), world_size=st.sampled_from([1, 2, 3, 5]))
def test_the_ranks_together_make_the_global_batch(dataset: PreparedDataset, config: StreamConfig, seed: int, world_size: int) -> None:
    whole = take(TrainingStream(dataset, config, seed=seed, context=["action"]), 8)
    ranks = [
        take(TrainingStream(dataset, config, seed=seed, rank=rank, world_size=world_size, context=["action"]), 8)
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole, *ranks, strict=True):
        assert sorted(row for part in parts for row in rows(part)) == sorted(rows(batch))
        for part in parts:
            for offsets, values in ((part.offsets, part.items), (part.target_offsets, part.targets), (part.seen_offsets, part.seen_items)):
                assert (offsets[0], offsets[-1], len(offsets)) == (0, len(values), len(part.user_rows) + 1)
            assert (part.position, part.next_position) == (batch.position, batch.next_position)
            assert part.global_num_targets == len(batch.targets) == batch.global_num_targets
            assert part.global_num_tokens == len(batch.items) == batch.global_num_tokens


@given(config=CONFIGS, seed=st.integers(0, 5))
def test_resuming_at_any_position_goes_on_exactly(dataset: PreparedDataset, config: StreamConfig, seed: int) -> None:
    stream = TrainingStream(dataset, config, seed=seed, context=["action"])
    batches = take(stream, 8)
    assert batches[0].position == StreamPosition()
    for place, batch in enumerate(batches[:-1]):
        assert batch.next_position is not None
        assert batches[place + 1].position == batch.next_position
        for resumed, expected in zip(take(stream, 2, batch.next_position), batches[place + 1 :], strict=False):
            assert_equal(resumed, expected)


@given(config=CONFIGS, seed=st.integers(0, 5))
def test_a_batch_is_filled_greedily_within_the_budget(dataset: PreparedDataset, config: StreamConfig, seed: int) -> None:
    batches = take(TrainingStream(dataset, config, seed=seed), 8)
    costs = [np.maximum(np.diff(batch.offsets), 1) for batch in batches]
    for cost, following in itertools.pairwise(costs):
        assert len(cost) == 1 or cost.sum() <= config.tokens_per_batch
        assert cost.sum() + following[0] > config.tokens_per_batch


@given(config=CONFIGS, seed=st.integers(0, 5))
def test_the_budget_groups_the_samples_and_changes_none(dataset: PreparedDataset, config: StreamConfig, seed: int) -> None:
    grouped = [row for batch in take(TrainingStream(dataset, config, seed=seed, context=["action"]), 4) for row in rows(batch)]
    single = TrainingStream(dataset, dataclasses.replace(config, tokens_per_batch=1), seed=seed, context=["action"]).batches()
    # an empty memory counts one token, so one sample a batch
    assert [row for batch in itertools.islice(single, len(grouped)) for row in rows(batch)] == grouped


@given(config=CONFIGS, seed=st.integers(0, 5), epoch=st.integers(0, 2))
def test_memory_lies_before_the_targets_and_targets_before_validation(
    dataset: PreparedDataset, temporal_dataset: PreparedDataset, config: StreamConfig, seed: int, epoch: int
) -> None:
    one_sample = dataclasses.replace(config, tokens_per_batch=1)
    for data in (dataset, temporal_dataset):
        user_ids = [user_id for shard in data.iterate_shards() for user_id in shard.user_ids]
        histories = {row: data.history(user_id) for row, user_id in enumerate(user_ids)}
        place = {item: (row, event) for row, history in histories.items() for event, item in enumerate(history.items.tolist())}
        for user, memory, targets, _ in epoch_rows(TrainingStream(data, one_sample, seed=seed), epoch):
            history = histories[user]
            assert history.timestamps is not None
            assert {place[item][0] for item in memory + targets} == {user}
            cut = place[targets[0]][1]
            assert [place[item][1] for item in memory] == list(range(max(0, cut - config.max_history_length), cut))
            end = min(cut + config.targets_per_cut, history.validation_begin)
            assert [place[item][1] for item in targets] == list(range(cut, end))
            assert config.min_history_length <= cut < history.validation_begin
            assert cut == 0 or history.timestamps[cut - 1] < history.timestamps[cut]


@given(seed=st.integers(0, 5), epoch=st.integers(0, 2), targets_per_cut=st.integers(1, 9), max_cuts=st.integers(1, 5))
def test_cuts_are_one_in_each_stratum(prepare_frame: PrepareFrame, seed: int, epoch: int, targets_per_cut: int, max_cuts: int) -> None:
    lengths = [10, 57, 2, 31]
    sequences = [[1000 * user + event for event in range(length + 2)] for user, length in enumerate(lengths)]
    data = prepare_frame(pl.DataFrame({"user_id": range(4), "items": sequences}), sequence_column="items", max_events_per_shard=60)
    config = StreamConfig(tokens_per_batch=1, targets_per_cut=targets_per_cut, max_cuts_per_history=max_cuts, oversized="own_batch")
    items = data.items()["item_id"].to_list()
    cuts: dict[int, list[int]] = {user: [] for user in range(4)}
    for user, _, targets, _ in epoch_rows(TrainingStream(data, config, seed=seed), epoch):
        cuts[user].append(items[targets[0]] - 1000 * user)
    for user, length in enumerate(lengths):
        count = min(max_cuts, -(-length // targets_per_cut))
        edges = [1 + stratum * (length - 1) / count for stratum in range(count + 1)]
        found = sorted(cuts[user])
        assert len(set(found)) == len(found) <= count
        for low, high in itertools.pairwise(edges):
            assert any(np.floor(low) <= cut < high + 1 for cut in found)


@given(
    seed=st.integers(0, 5), epoch=st.integers(0, 2), targets_per_cut=st.integers(1, 9), max_cuts=st.integers(1, 5), least=st.integers(0, 3)
)
@example(seed=0, epoch=0, targets_per_cut=9, max_cuts=1, least=3)
def test_newest_cuts_are_one_before_the_newest_training_events(
    prepare_frame: PrepareFrame, seed: int, epoch: int, targets_per_cut: int, max_cuts: int, least: int
) -> None:
    lengths = [10, 57, 2, 31]
    sequences = [[1000 * user + event for event in range(length + 2)] for user, length in enumerate(lengths)]
    data = prepare_frame(pl.DataFrame({"user_id": range(4), "items": sequences}), sequence_column="items", max_events_per_shard=60)
    config = StreamConfig(
        tokens_per_batch=1,
        targets_per_cut=targets_per_cut,
        max_cuts_per_history=max_cuts,
        min_history_length=least,
        oversized="own_batch",
        cuts="newest",
    )
    items = data.items()["item_id"].to_list()
    found = [
        (user, [items[target] for target in targets]) for user, _, targets, _ in epoch_rows(TrainingStream(data, config, seed=seed), epoch)
    ]
    expected = []
    for user, length in enumerate(lengths):
        if length > least:
            first = max(length - targets_per_cut, least)
            expected.append((user, [1000 * user + event for event in range(first, length)]))
    assert sorted(found) == expected


@pytest.mark.parametrize("cuts", ["everywhere", "newest"])
def test_only_samples_of_evaluated_histories_are_excluded(temporal_dataset: PreparedDataset, cuts: Any) -> None:
    config = StreamConfig(tokens_per_batch=1, targets_per_cut=2, oversized="own_batch", cuts=cuts)
    evaluated = set()
    for shard in temporal_dataset.iterate_shards():
        evaluated |= set((shard.first_user + np.flatnonzero(shard.validation_begin < np.diff(shard.offsets))).tolist())
    whole, kept = (
        epoch_rows(TrainingStream(temporal_dataset, dataclasses.replace(config, exclude_evaluated=excluded), seed=1), 0)
        for excluded in (False, True)
    )
    assert evaluated & {row[0] for row in whole}
    assert kept and kept == [row for row in whole if row[0] not in evaluated]


def test_excluding_every_history_is_refused(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    data = prepare_frame(serial_log([9, 20]))
    with pytest.raises(ValueError, match=r"no training sample: .*, or targets of validation or test \(--stream.exclude-evaluated\)"):
        next(TrainingStream(data, StreamConfig(exclude_evaluated=True), seed=0).batches())


@given(seed=st.integers(0, 50))
def test_every_history_that_can_be_cut_is_cut_in_every_epoch(dataset: PreparedDataset, seed: int) -> None:
    config = StreamConfig(tokens_per_batch=1, targets_per_cut=4, oversized="own_batch")
    expected = set()
    for shard in dataset.iterate_shards():
        for user, (first, n) in enumerate(zip(shard.offsets, shard.validation_begin, strict=False)):
            assert shard.timestamps is not None
            times = shard.timestamps[first : first + n]
            if n > 1 and times[0] < times[-1]:
                expected.add(shard.first_user + user)
    stream = TrainingStream(dataset, config, seed=seed)
    orders = [[row[0] for row in epoch_rows(stream, epoch)] for epoch in range(2)]
    assert [set(order) for order in orders] == [expected, expected]
    assert orders[0] != orders[1]


def test_samples_do_not_depend_on_the_shards(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    config = StreamConfig(tokens_per_batch=1, targets_per_cut=2, oversized="own_batch")
    datasets = [prepare_frame(serial_log([9, 20, 4, 33]), max_events_per_shard=size) for size in (1, 30, 1000)]
    epochs = [sorted(epoch_rows(TrainingStream(data, config, seed=3), 1)) for data in datasets]
    assert epochs[0] == epochs[1] == epochs[2]


def test_the_seed_changes_the_sequence(dataset: PreparedDataset) -> None:
    config = StreamConfig(tokens_per_batch=60, targets_per_cut=2)
    one, same, other = (take(TrainingStream(dataset, config, seed=seed), 3) for seed in (1, 1, 2))
    for left, right in zip(one, same, strict=True):
        assert_equal(left, right)
    assert any(list(rows(left)) != list(rows(right)) for left, right in zip(one, other, strict=True))


def test_the_sequence_hash_names_all_that_the_sequence_depends_on(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    frame = serial_log([9, 20])
    data = [prepare_frame(log, max_events_per_shard=size) for log, size in ((frame, 100), (frame, 10), (frame.head(-1), 100))]
    config = StreamConfig()
    hashes = {TrainingStream(dataset, config, seed=0).sequence_hash for dataset in data}
    hashes.add(TrainingStream(data[0], dataclasses.replace(config, targets_per_cut=5), seed=0).sequence_hash)
    hashes.add(TrainingStream(data[0], config, seed=1).sequence_hash)
    assert len(hashes) == 5
    dearer = dataclasses.replace(config, linear_cost=1.0, quadratic_cost=1.0, target_cost=2.0)
    assert TrainingStream(data[0], dearer, seed=0, rank=1, world_size=3).sequence_hash in hashes


def test_the_sequence_hash_of_an_earlier_version_still_names_its_sequence() -> None:
    manifest = SimpleNamespace(
        content_hash="0" * 64, split=SimpleNamespace(ties="together"), shards=[SimpleNamespace(num_users=2, num_events=9)]
    )
    data: Any = SimpleNamespace(manifest=manifest, context_sizes=dict)
    config = StreamConfig(tokens_per_batch=300, max_history_length=100)
    # written into checkpoints by version 0.1 before there was a choice of cuts
    of_old = "c8d7f3921679cf0fc94024aab1260aeffaf41da122b97e875649d959cac1306b"
    assert TrainingStream(data, config, seed=3).sequence_hash == of_old
    for younger in ({"cuts": "newest"}, {"exclude_evaluated": True}):
        assert TrainingStream(data, dataclasses.replace(config, **younger), seed=3).sequence_hash != of_old


def test_the_sequence_is_pinned(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    data = prepare_frame(serial_log([9, 20]).with_columns(timestamp=pl.col("item_id")))
    batch = next(TrainingStream(data, StreamConfig(tokens_per_batch=60, targets_per_cut=5), seed=11).batches())
    assert batch.user_rows.tolist() == [1, 1, 1, 0, 0, 1, 0, 1]
    assert np.diff(batch.offsets).tolist() == [12, 17, 1, 1, 4, 8, 2, 12]
    assert int(np.bitwise_xor.reduce(batch.token_keys)) == -1303246608694629693


def test_token_keys_differ_between_places_cuts_and_epochs(dataset: PreparedDataset) -> None:
    config = StreamConfig(tokens_per_batch=1, targets_per_cut=1, oversized="own_batch")
    stream = TrainingStream(dataset, config, seed=0)
    keys = [key for epoch in range(2) for row in epoch_rows(stream, epoch) for key in row[-1]]
    assert len(set(keys)) == len(keys)


def test_a_sample_beyond_the_budget_is_refused_by_name(dataset: PreparedDataset) -> None:
    config = StreamConfig(tokens_per_batch=40, max_history_length=1000, targets_per_cut=1)
    with pytest.raises(ValueError, match=r"user 4: a sample of \d\d events is longer than StreamConfig.tokens_per_batch=40"):
        take(TrainingStream(dataset, config, seed=0), 1000)


def test_a_dataset_without_a_sample_is_refused(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    short = prepare_frame(serial_log([1, 1, 1, 2]).with_columns(timestamp=pl.lit(5)), max_events_per_shard=1)
    with pytest.raises(ValueError, match="no training sample"):
        take(TrainingStream(short, StreamConfig(), seed=0), 1)


@pytest.mark.parametrize(
    ("position", "match"),
    [
        (StreamPosition(0, 99, 0), "does not exist"),
        (StreamPosition(0, 0, 10_000), "samples"),
        (StreamPosition(-1, 0, 0), "does not exist"),
    ],
)
def test_an_impossible_position_is_refused(dataset: PreparedDataset, position: StreamPosition, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        take(TrainingStream(dataset, StreamConfig(), seed=0), 1, position)


def test_bad_ranks_and_columns_are_refused(dataset: PreparedDataset) -> None:
    with pytest.raises(ValueError, match="rank 2 of 2"):
        TrainingStream(dataset, StreamConfig(), seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="StreamConfig costs must be numbers where 2 ranks share a batch"):
        TrainingStream(dataset, StreamConfig(), seed=0, rank=1, world_size=2)
    with pytest.raises(ValueError, match="'nothing'"):
        TrainingStream(dataset, StreamConfig(), seed=0, context=["nothing"])


def test_at_most_two_shards_are_in_memory(prepare_frame: PrepareFrame, serial_log: SerialLog) -> None:
    data = prepare_frame(serial_log([20] * 30), max_events_per_shard=20)
    stream = TrainingStream(data, StreamConfig(tokens_per_batch=200, targets_per_cut=4), seed=0)

    def num_shards() -> int:
        return sum(type(thing) is HistoryShard for thing in gc.get_objects())

    gc.collect()
    before = num_shards()
    for _ in itertools.islice(stream.batches(), 20):
        assert num_shards() - before <= 2


def test_a_history_of_100000_events_streams(prepare_frame: PrepareFrame) -> None:
    rng = np.random.default_rng(0)
    columns = {"item_id": rng.integers(0, 50, 100_000), "timestamp": rng.integers(0, 50_000, 100_000)}
    data = prepare_frame(pl.DataFrame({"user_id": np.full(100_000, 7), **columns}))
    batches = take(TrainingStream(data, StreamConfig(max_history_length=100_000, tokens_per_batch=131_072), seed=0), 64)
    assert max(int(np.diff(batch.offsets).max()) for batch in batches) > 95_000
    history = data.history(7)
    lengths = np.diff(batches[0].offsets)
    assert np.array_equal(batches[0].items[: lengths[0]], history.items[: lengths[0]])


def test_iterate_train_items_gives_the_training_events(dataset: PreparedDataset) -> None:
    counts = np.zeros(dataset.manifest.num_items, np.int64)
    num_users = 0
    for offsets, items in iterate_train_items(dataset):
        assert offsets[-1] == len(items)
        num_users += len(offsets) - 1
        counts += np.bincount(items, minlength=len(counts))
    assert num_users == dataset.manifest.num_users
    assert np.array_equal(counts, dataset.train_counts())
