"""Batches of histories as flat numpy arrays, and how samples are gathered into them.

Shapes: ``B`` rows (samples), ``L`` memory events, ``S`` target events of a batch; ``E`` events of a source.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import StreamConfig
from gbla_rec.data.keyed_random import keyed_sequence, keyed_uint64

if TYPE_CHECKING:
    # files need polars and pyarrow, which batches in memory do without
    from gbla_rec.data.shard_files import HistoryShard

Int64Array = NDArray[np.int64]


@dataclass(frozen=True, slots=True, order=True)
class StreamPosition:
    """The next sample of a training stream: epoch, place in the epoch's order of shards, place in the shard's order."""

    epoch: int = 0
    shard: int = 0
    sample: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class HistoryBatch:
    """One rank's part of a global batch: memories to read and the target events that follow them.

    A part may be empty (``B = 0``); its offsets are then ``[0]``.
    """

    user_rows: Int64Array
    """``(B,)`` global user rows."""
    items: Int64Array
    """``(L,)`` item indices of the memories, oldest first."""
    offsets: Int64Array
    """``(B + 1,)``."""
    context: dict[str, NDArray[np.int32]]
    """``(L,)`` codes of each context column."""
    targets: Int64Array
    """``(S,)`` item indices in the order of time."""
    target_offsets: Int64Array
    """``(B + 1,)``."""
    token_keys: Int64Array
    """``(L,)`` hash of seed, epoch, user, cut and place in the history, for keyed dropout; zeros in evaluation."""
    seen_items: Int64Array
    """Evaluation only: ``(Q,)`` items of the untruncated memories."""
    seen_offsets: Int64Array
    """``(B + 1,)``; all zero in training."""
    global_num_targets: int
    """Targets of the global batch over all ranks."""
    global_num_tokens: int
    """Memory events of the global batch over all ranks."""
    position: StreamPosition | None
    """Where the stream stood before this batch; ``None`` in evaluation."""
    next_position: StreamPosition | None
    """Where a stream must start to yield the next batch."""

    @classmethod
    def of_lengths(
        cls,
        items: Int64Array,
        lengths: Sequence[int] | Int64Array,
        *,
        targets: Int64Array | None = None,
        target_lengths: Sequence[int] | Int64Array | None = None,
        context: dict[str, NDArray[np.int32]] | None = None,
        token_keys: Int64Array | None = None,
        seen_items: Int64Array | None = None,
        seen_lengths: Sequence[int] | Int64Array | None = None,
        global_num_targets: int | None = None,
        global_num_tokens: int | None = None,
        position: StreamPosition | None = None,
    ) -> "HistoryBatch":
        """A batch from flat arrays and the lengths of its rows ``(B,)``; what is left out is empty, or zero, in every row.

        Args:
            items: ``(L,)`` int64, as all arrays are described above.
            lengths: memory events of each row.
            targets: ``(S,)``.
            target_lengths: targets of each row.
            context: ``(L,)`` each.
            token_keys: ``(L,)``.
            seen_items: ``(Q,)``.
            seen_lengths: of each row.
            global_num_targets: None: this is the whole batch.
            global_num_tokens: None: this is the whole batch.
            position: of this batch, and of the next.
        """
        nothing = np.zeros(0, np.int64)
        targets = nothing if targets is None else targets
        return cls(
            user_rows=np.arange(len(lengths)),
            items=items,
            offsets=_offsets(lengths),
            context={} if context is None else context,
            targets=targets,
            target_offsets=_offsets([0] * len(lengths) if target_lengths is None else target_lengths),
            token_keys=np.zeros(len(items), np.int64) if token_keys is None else token_keys,
            seen_items=nothing if seen_items is None else seen_items,
            seen_offsets=_offsets([0] * len(lengths) if seen_lengths is None else seen_lengths),
            global_num_targets=len(targets) if global_num_targets is None else global_num_targets,
            global_num_tokens=len(items) if global_num_tokens is None else global_num_tokens,
            position=position,
            next_position=position,
        )


def _offsets(lengths: Sequence[int] | Int64Array) -> Int64Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Cuts in histories: memory ``[begin, cut)``, targets ``[cut, end)``, all ``(B,)`` int64, relative to the history.

    ``source`` is the flat index of event ``begin`` in the arrays of an ``EventSource``.
    """

    user_rows: Int64Array
    begin: Int64Array
    cut: Int64Array
    end: Int64Array
    source: Int64Array

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.cut)

    @property
    def lengths(self) -> Int64Array:
        """``(B,)`` memory events."""
        return self.cut - self.begin

    @property
    def num_targets(self) -> Int64Array:
        """``(B,)`` target events."""
        return self.end - self.cut

    def take(self, which: slice | NDArray[Any]) -> "Samples":
        """Some of the samples."""
        return Samples(self.user_rows[which], self.begin[which], self.cut[which], self.end[which], self.source[which])


@dataclass(frozen=True, slots=True, eq=False)
class EventSource:
    """Flat events that samples point into: ``items (E,)`` int64 and ``context (E,)`` int32 per column."""

    items: Int64Array
    context: dict[str, NDArray[np.int32]]

    @classmethod
    def of_shard(cls, shard: "HistoryShard") -> "EventSource":
        """The events of a shard."""
        return cls(shard.items, shard.context)

    def compact(self, samples: Samples) -> "tuple[EventSource, Samples]":
        """A source with the events of ``samples`` only, so that the rest of the shard can be dropped."""
        places, offsets = flat_ranges(samples.source, samples.end - samples.begin)
        source = EventSource(self.items[places], {name: codes[places] for name, codes in self.context.items()})
        return source, Samples(samples.user_rows, samples.begin, samples.cut, samples.end, offsets[:-1])


def flat_ranges(starts: Int64Array, lengths: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Concatenate ``range(start, start + length)`` of all rows.

    Returns:
        The flat ``(L,)`` int64 values and their offsets ``(B + 1,)`` int64.
    """
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return np.arange(offsets[-1], dtype=np.int64) + np.repeat(starts - offsets[:-1], lengths), offsets


def gather(source: EventSource, samples: Samples, key: tuple[int, ...] | None) -> HistoryBatch:
    """Gather samples of one source into a batch without global counts.

    Args:
        source: the events.
        samples: what to gather, in this order.
        key: integers that enter the token keys; ``None`` leaves them zero.
    """
    places, offsets = flat_ranges(samples.source, samples.lengths)
    target_places, target_offsets = flat_ranges(samples.source + samples.lengths, samples.num_targets)
    if key is None:
        token_keys = np.zeros(len(places), np.int64)
    else:
        in_history, _ = flat_ranges(samples.begin, samples.lengths)
        of_sample = keyed_uint64(*key, samples.user_rows, samples.cut)
        token_keys = keyed_sequence(np.repeat(of_sample, samples.lengths), in_history).view(np.int64)
    return HistoryBatch(
        user_rows=samples.user_rows,
        items=source.items[places],
        offsets=offsets,
        context={name: codes[places] for name, codes in source.context.items()},
        targets=source.items[target_places],
        target_offsets=target_offsets,
        token_keys=token_keys,
        seen_items=np.zeros(0, np.int64),
        seen_offsets=np.zeros(len(samples) + 1, np.int64),
        global_num_targets=0,
        global_num_tokens=0,
        position=None,
        next_position=None,
    )


def concatenate_offsets(parts: Sequence[Int64Array]) -> Int64Array:
    """Offsets of the concatenation of jagged arrays, from the offsets of each."""
    return _offsets(np.concatenate([np.diff(part) for part in parts]))


def sample_costs(lengths: Int64Array, num_targets: Int64Array, config: StreamConfig) -> NDArray[np.float64]:
    """Cost of each sample: ``linear_cost * T + quadratic_cost * T^2 + target_cost * S``.

    Args:
        lengths: ``(B,)`` int64 memory events of each sample.
        num_targets: ``(B,)`` int64 targets of each sample.
        config: the costs, stated or counted (``with_sample_costs``).

    Returns:
        ``(B,)`` float64.
    """
    assert config.linear_cost is not None and config.quadratic_cost is not None
    events = lengths.astype(np.float64)
    costs: NDArray[np.float64] = events * (config.linear_cost + config.quadratic_cost * events) + (config.target_cost or 0.0) * num_targets
    return costs


def split_by_cost(costs: NDArray[np.float64], world_size: int) -> Int64Array:
    """Deal samples to ranks: the dearest first, each to the rank with the least cost so far (LPT).

    The dearest rank costs at most ``4/3 - 1/(3 world_size)`` times what the best possible division would give it
    (Graham, SIAM J. Appl. Math. 17, 1969).

    Args:
        costs: ``(B,)`` float64, not negative.
        world_size: number of ranks; some may get nothing.

    Returns:
        ``(B,)`` int64 rank of each sample; ties go to the lower sample and the lower rank.
    """
    ranks = np.zeros(len(costs), np.int64)
    if world_size == 1:
        return ranks
    # a free sample still takes its turn
    costs = np.maximum(costs, 1e-9)
    order = np.argsort(-costs, kind="stable")
    loads = [(0.0, rank) for rank in range(world_size)]
    dealt = []
    for cost in costs[order].tolist():
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + cost, rank))
        dealt.append(rank)
    ranks[order] = dealt
    return ranks
