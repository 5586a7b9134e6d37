"""Users to evaluate or to recommend to, each once: the memory before the split, and the targets after it.

Validation reads ``[0, validation_begin)`` to predict ``[validation_begin, test_begin)``; test reads ``[0, test_begin)`` to
predict ``[test_begin, n)``. Users without memory or targets are left out. ``next`` reads all events, ``[0, n)``, of every user, and has no
targets.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import MultiplyAdds
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.histories import EventSource, HistoryBatch, Samples, flat_ranges, gather
from gbla_rec.data.keyed_random import keyed_uint64
from gbla_rec.data.shard_files import HistoryShard

Int64Array = NDArray[np.int64]
EvaluationSplit = Literal["validation", "test", "next"]
USERS_KEY = 5
MAX_SHARDS_HELD = 2
BY_TOKENS = MultiplyAdds(event=1.0, pair=0.0, target=0.0, target_event=0.0)


@dataclass(frozen=True, slots=True, eq=False)
class _PlannedBatch:
    """Users (local rows) of one shard that make a batch."""

    shard: int
    users: Int64Array
    num_tokens: int
    num_targets: int
    cost: float


def evaluation_batches(
    dataset: PreparedDataset,
    split: EvaluationSplit,
    *,
    tokens_per_batch: int,
    max_history_length: int,
    rank: int = 0,
    world_size: int = 1,
    users_per_batch: int | None = None,
    num_users: int | None = None,
    seed: int = 0,
    context: Sequence[str] = (),
    costs: MultiplyAdds = BY_TOKENS,
    num_decoded: int = 1,
) -> Iterator[HistoryBatch]:
    """Yield this rank's batches; every rank gets the same number, the last ones may be empty.

    Which users make a batch does not depend on the number of ranks. Batches of like cost are done at the same time: ranks wait for
    each other in every batch, at the exchange of table rows.

    Args:
        dataset: the prepared dataset.
        split: which targets.
        tokens_per_batch: memory events of one batch of one rank; a longer memory is a batch alone.
        max_history_length: only the most recent events are read; ``seen_items`` has all.
        rank: this rank.
        world_size: number of ranks.
        users_per_batch: at most so many users in a batch; ``None`` for as many as ``tokens_per_batch`` lets in.
        num_users: evaluate a sample of so many users, drawn from ``seed``; ``None`` for all.
        seed: of the sample.
        context: context columns to deliver.
        costs: of a user, by which batches are put beside each other.
        num_decoded: targets, or beams, that are decoded for a user.

    Raises:
        ValueError: if an argument is out of range, or no user can be evaluated.
    """
    _check_arguments(split, tokens_per_batch, max_history_length, rank, world_size, users_per_batch, num_users)
    limits = (tokens_per_batch, users_per_batch)
    return _batches(dataset, split, limits, max_history_length, rank, world_size, num_users, seed, tuple(context), costs, num_decoded)


def _batches(
    dataset: PreparedDataset,
    split: EvaluationSplit,
    limits: tuple[int, int | None],
    max_history_length: int,
    rank: int,
    world_size: int,
    num_users: int | None,
    seed: int,
    context: tuple[str, ...],
    costs: MultiplyAdds,
    num_decoded: int,
) -> Iterator[HistoryBatch]:
    largest_key = None if num_users is None else _largest_key(dataset, split, num_users, seed)
    plan: list[_PlannedBatch] = []
    for index in range(dataset.num_shards):
        memory, end = _memory_and_end(dataset, index, split)
        users = _eligible(memory, end, split)
        if largest_key is not None:
            users = users[_keys(users + dataset.first_user(index), seed) <= largest_key]
        lengths = np.minimum(memory[users], max_history_length)
        user_costs = costs.of(lengths.astype(np.float64), num_decoded)
        plan += _plan_shard(index, users, lengths, (end - memory)[users], user_costs, *limits)
    if not plan:
        raise ValueError(
            f"{dataset.path}: no user has an event"
            if split == "next"
            else f"{dataset.path}: no user has {split} targets and events before them; prepare longer histories, or with another --split "
            "or fewer targets"
        )
    held: dict[int, HistoryShard] = {}
    for step in _in_steps(plan, world_size, dataset.num_shards):
        batch = _empty_batch(context)
        if rank < len(step):
            shard = _held_shard(held, dataset, step[rank].shard, context)
            batch = _gather(shard, step[rank].users, split, max_history_length)
        yield dataclasses.replace(
            batch,
            global_num_targets=sum(part.num_targets for part in step),
            global_num_tokens=sum(part.num_tokens for part in step),
        )


def _in_steps(plan: list[_PlannedBatch], world_size: int, num_shards: int) -> Iterator[list[_PlannedBatch]]:
    """What the ranks do at the same time: neighbours in cost, among the batches of about one shard (so that none is read often)."""
    if world_size == 1:
        # nobody waits: shards in their order, each read once
        yield from ([batch] for batch in plan)
        return
    window = world_size * -(-len(plan) // (num_shards * world_size))
    for start in range(0, len(plan), window):
        by_cost = sorted(plan[start : start + window], key=lambda batch: -batch.cost)
        for first in range(0, len(by_cost), world_size):
            yield by_cost[first : first + world_size]


def _held_shard(held: dict[int, HistoryShard], dataset: PreparedDataset, index: int, context: tuple[str, ...]) -> HistoryShard:
    """Shard ``index``, read unless it is held; at most two are, since a window of batches may lie across two."""
    if index not in held:
        if len(held) == MAX_SHARDS_HELD:
            # the oldest goes before the new one comes
            del held[next(iter(held))]
        held[index] = dataset.read_shard(index, context)
    return held[index]


def _plan_shard(
    index: int,
    users: Int64Array,
    lengths: Int64Array,
    num_targets: Int64Array,
    user_costs: NDArray[np.float64],
    tokens_per_batch: int,
    users_per_batch: int | None,
) -> Iterator[_PlannedBatch]:
    ends, targets = np.cumsum(lengths), np.cumsum(num_targets)
    first = 0
    while first < len(users):
        tokens_before, targets_before = (int(ends[first - 1]), int(targets[first - 1])) if first else (0, 0)
        stop = max(first + 1, int(np.searchsorted(ends, tokens_before + tokens_per_batch, side="right")))
        stop = stop if users_per_batch is None else min(stop, first + users_per_batch)
        num_tokens, cost = int(ends[stop - 1]) - tokens_before, float(user_costs[first:stop].sum())
        yield _PlannedBatch(index, users[first:stop], num_tokens, int(targets[stop - 1]) - targets_before, cost)
        first = stop


def _gather(shard: HistoryShard, users: Int64Array, split: EvaluationSplit, max_history_length: int) -> HistoryBatch:
    starts = shard.offsets[:-1][users]
    memory, end = (bound[users] for bound in _bounds(shard.validation_begin, shard.test_begin, np.diff(shard.offsets), split))
    begin = np.maximum(memory - max_history_length, 0)
    batch = gather(EventSource.of_shard(shard), Samples(users + shard.first_user, begin, memory, end, starts + begin), None)
    places, seen_offsets = flat_ranges(starts, memory)
    return dataclasses.replace(batch, seen_items=shard.items[places], seen_offsets=seen_offsets)


def _empty_batch(context: Sequence[str]) -> HistoryBatch:
    none = np.zeros(0, np.int64)
    source = EventSource(none, {name: np.zeros(0, np.int32) for name in context})
    return gather(source, Samples(none, none, none, none, none), None)


def _memory_and_end(dataset: PreparedDataset, index: int, split: EvaluationSplit) -> tuple[Int64Array, Int64Array]:
    return _bounds(*dataset.read_lengths(index), split)


def _bounds(
    validation_begin: Int64Array, test_begin: Int64Array, num_events: Int64Array, split: EvaluationSplit
) -> tuple[Int64Array, Int64Array]:
    ends = {"validation": (validation_begin, test_begin), "test": (test_begin, num_events), "next": (num_events, num_events)}
    return ends[split]


def _eligible(memory: Int64Array, end: Int64Array, split: EvaluationSplit) -> Int64Array:
    return np.flatnonzero((memory > 0) & ((end > memory) | (split == "next"))).astype(np.int64)


def _keys(user_rows: Int64Array, seed: int) -> NDArray[np.uint64]:
    return keyed_uint64(seed, USERS_KEY, user_rows)


def _largest_key(dataset: PreparedDataset, split: EvaluationSplit, num_users: int, seed: int) -> np.uint64:
    """The users with the ``num_users`` smallest keys are the sample; this is the largest of those keys."""
    smallest = np.zeros(0, np.uint64)
    for index in range(dataset.num_shards):
        users = _eligible(*_memory_and_end(dataset, index, split), split)
        smallest = np.sort(np.concatenate([smallest, _keys(users + dataset.first_user(index), seed)]))[:num_users]
    return smallest[-1] if len(smallest) else np.uint64(0)


def _check_arguments(
    split: str,
    tokens_per_batch: int,
    max_history_length: int,
    rank: int,
    world_size: int,
    users_per_batch: int | None,
    num_users: int | None,
) -> None:
    if split not in get_args(EvaluationSplit):
        raise ValueError(f"split must be one of {get_args(EvaluationSplit)}, got {split!r}")
    counts = {"tokens_per_batch": tokens_per_batch, "max_history_length": max_history_length}
    for name, value in (counts | {"users_per_batch": users_per_batch, "num_users": num_users}).items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
