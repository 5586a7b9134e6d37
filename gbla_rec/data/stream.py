"""Training data as one endless, deterministic sequence of global batches, whatever the number of ranks.

The sequence is a function of (dataset, StreamConfig, seed). Its position is three integers, so a run saved on N ranks
goes on exactly on M. An epoch visits the shards in a shuffled order; batches run on across shards and epochs.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import StreamConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import evaluation_batches as evaluation_batches
from gbla_rec.data.histories import EventSource, HistoryBatch, Samples, concatenate_offsets, gather, sample_costs, split_by_cost
from gbla_rec.data.histories import StreamPosition as StreamPosition
from gbla_rec.data.keyed_random import keyed_permutation
from gbla_rec.data.micro_batches import micro_batch_of_rows
from gbla_rec.data.sampling import training_samples
from gbla_rec.data.shard_files import HistoryShard

SHARD_KEY, TOKEN_KEY = 3, 4
START = StreamPosition()


@dataclass(frozen=True, slots=True, eq=False)
class _PlannedShard:
    """A shard in memory with the order of its samples; ``ends`` sums their budgets."""

    epoch: int
    place: int
    shard: HistoryShard
    samples: Samples
    ends: NDArray[np.int64]

    def fill(self, first: int, room: int) -> int:
        """End of the longest run of samples from ``first`` that fits into ``room`` tokens."""
        used = int(self.ends[first - 1]) if first else 0
        return max(first, int(np.searchsorted(self.ends, used + room, side="right")))

    def budget(self, first: int, stop: int) -> int:
        """Tokens that the samples ``first`` to ``stop`` count for."""
        return int(self.ends[stop - 1] - (self.ends[first - 1] if first else 0)) if stop > first else 0


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Samples of a batch from one shard of one epoch."""

    epoch: int
    source: EventSource
    samples: Samples


class TrainingStream:
    """One rank's view of the training sequence; at most two shards are in memory."""

    def __init__(
        self,
        dataset: PreparedDataset,
        config: StreamConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_micro_batches: int = 1,
        context: Sequence[str] = (),
    ) -> None:
        """Describe the stream; nothing is read yet.

        Args:
            dataset: the prepared dataset.
            config: samples and budget; with several ranks, the costs that divide it (``with_sample_costs``).
            seed: seed of the order and the cuts.
            rank: this rank.
            world_size: number of ranks; it does not change the global batches, nor their micro batches.
            num_micro_batches: parts into which a global batch is cut before the ranks share each of them.
            context: context columns to deliver.

        Raises:
            ValueError: if ``rank`` is outside ``[0, world_size)``, ``num_micro_batches`` is not positive, a context column is unknown, or
                there are several ranks and no costs.
        """
        if num_micro_batches < 1:
            raise ValueError(f"num_micro_batches must be positive, got {num_micro_batches}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size), got rank {rank} of {world_size}")
        if world_size > 1 and not config.has_costs:
            raise ValueError(
                f"StreamConfig costs must be numbers where {world_size} ranks share a batch, got None; "
                "count them from the model with gbla_rec.config.with_sample_costs"
            )
        unknown = sorted(set(context) - set(dataset.context_sizes()))
        if unknown:
            raise ValueError(f"context columns {unknown} are not in {dataset.path}, which has {sorted(dataset.context_sizes())}")
        self._dataset = dataset
        self._config = config
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._num_micro_batches = num_micro_batches
        self._context = tuple(context)
        self._keep_ties = dataset.manifest.split.ties == "together"

    @property
    def sequence_hash(self) -> str:
        """Names the sequence of global batches: a position means the same in streams of equal hashes, on any number of ranks."""
        # how ranks share a batch does not change the batch
        shares = {"linear_cost": 0.0, "quadratic_cost": 0.0}
        manifest = self._dataset.manifest
        shards = [(shard.num_users, shard.num_events) for shard in manifest.shards]
        config = dataclasses.asdict(self._config) | shares
        del config["target_cost"]
        # settings younger than the hash: their defaults name the same sequence as before
        for name, default in (("cuts", "everywhere"), ("exclude_evaluated", False)):
            if config[name] == default:
                del config[name]
        identity = {"content": manifest.content_hash, "ties": manifest.split.ties, "shards": shards, "config": config, "seed": self._seed}
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def batches(self, position: StreamPosition = START) -> Iterator[HistoryBatch]:
        """Yield this rank's part of each global batch from ``position`` on, without end: its micro batches, joined.

        Raises:
            ValueError: as ``steps`` does.
        """
        for micro_batches in self.steps(position):
            yield micro_batches[0] if len(micro_batches) == 1 else _concatenate(micro_batches)

    def steps(self, position: StreamPosition = START) -> Iterator[list[HistoryBatch]]:
        """Yield this rank's part of each micro batch of each global batch from ``position`` on, without end.

        All parts have the counts and positions of the global batch, so that losses weighted by ``global_num_targets`` add up over them
        and over the ranks to that of the whole. Every rank gets ``num_micro_batches`` parts, some of which may be empty.
        Samples are added to a batch while their memory tokens stay within ``tokens_per_batch``; a batch has at least one
        sample, and a sample counts at least one token.

        Raises:
            ValueError: if the position does not exist, the dataset has no training sample, or a sample is longer than
                ``tokens_per_batch`` and ``oversized="refuse"``.
        """
        planned = self._open(position)
        first, start = position.sample, position
        pieces: list[_Piece] = []
        room = self._config.tokens_per_batch
        num_empty_shards = 0
        while True:
            stop = planned.fill(first, room)
            if not pieces and stop == first < len(planned.samples):
                self._check_oversized(planned, first)
                stop = first + 1
            source = EventSource.of_shard(planned.shard)
            if stop > first:
                pieces.append(_Piece(planned.epoch, source, planned.samples.take(slice(first, stop))))
            if stop < len(planned.samples):
                next_position = StreamPosition(planned.epoch, planned.place, stop)
                yield self._assemble(pieces, start, next_position)
                first, start, pieces, room = stop, next_position, [], self._config.tokens_per_batch
                continue
            if stop > first:
                # the shard can be dropped: only the events of this batch stay
                pieces[-1] = _Piece(planned.epoch, *source.compact(pieces[-1].samples))
            room -= planned.budget(first, stop)
            num_empty_shards = 0 if len(planned.samples) else num_empty_shards + 1
            if num_empty_shards > self._dataset.num_shards:
                excluded = ", or targets of validation or test (--stream.exclude-evaluated)" if self._config.exclude_evaluated else ""
                raise ValueError(
                    f"{self._dataset.path} has no training sample: every history has fewer than "
                    f"min_history_length + 1 = {self._config.min_history_length + 1} training events (or all at one time){excluded}"
                )
            del source
            planned, first = self._next(planned), 0

    def _open(self, position: StreamPosition) -> _PlannedShard:
        if min(position.epoch, position.shard, position.sample) < 0 or position.shard >= self._dataset.num_shards:
            raise ValueError(f"{position} does not exist: {self._dataset.path} has {self._dataset.num_shards} shards")
        planned = self._plan(position.epoch, position.shard)
        if position.sample > len(planned.samples):
            raise ValueError(
                f"{position} does not exist: its shard has {len(planned.samples)} samples; it belongs to another dataset or config"
            )
        return planned

    def _next(self, planned: _PlannedShard) -> _PlannedShard:
        place = planned.place + 1
        return self._plan(planned.epoch, place) if place < self._dataset.num_shards else self._plan(planned.epoch + 1, 0)

    def _plan(self, epoch: int, place: int) -> _PlannedShard:
        index = int(keyed_permutation(self._dataset.num_shards, self._seed, epoch, SHARD_KEY)[place])
        shard = self._dataset.read_shard(index, self._context)
        samples = training_samples(shard, self._config, seed=self._seed, epoch=epoch, keep_ties=self._keep_ties)
        return _PlannedShard(epoch, place, shard, samples, np.cumsum(np.maximum(samples.lengths, 1)))

    def _check_oversized(self, planned: _PlannedShard, sample: int) -> None:
        if self._config.oversized == "own_batch":
            return
        user_row = int(planned.samples.user_rows[sample])
        raise ValueError(
            f"user {planned.shard.user_ids[user_row - planned.shard.first_user]!r}: "
            f"a sample of {planned.samples.lengths[sample]} events is longer than StreamConfig.tokens_per_batch="
            f"{self._config.tokens_per_batch}; raise it (--stream.tokens-per-batch), lower max_history_length="
            f"{self._config.max_history_length} (--stream.max-history-length), or set --stream.oversized own_batch"
        )

    def _costs(self, lengths: NDArray[np.int64], num_targets: NDArray[np.int64]) -> NDArray[np.float64]:
        if not self._config.has_costs:
            # one rank gets everything
            return np.zeros(len(lengths))
        return sample_costs(lengths, num_targets, self._config)

    def _assemble(self, pieces: Sequence[_Piece], position: StreamPosition, next_position: StreamPosition) -> list[HistoryBatch]:
        lengths = np.concatenate([piece.samples.lengths for piece in pieces])
        num_targets = np.concatenate([piece.samples.num_targets for piece in pieces])
        costs = self._costs(lengths, num_targets)
        micro_batches = micro_batch_of_rows(lengths, num_targets, self._num_micro_batches)
        parts = []
        for micro_batch in range(self._num_micro_batches):
            rows = np.flatnonzero(micro_batches == micro_batch)
            is_mine = np.zeros(len(lengths), bool)
            is_mine[rows] = split_by_cost(costs[rows], self._world_size) == self._rank
            parts.append(
                dataclasses.replace(
                    self._gather(pieces, is_mine),
                    global_num_targets=int(num_targets.sum()),
                    global_num_tokens=int(lengths.sum()),
                    position=position,
                    next_position=next_position,
                )
            )
        return parts

    def _gather(self, pieces: Sequence[_Piece], is_mine: NDArray[np.bool_]) -> HistoryBatch:
        parts, first = [], 0
        for piece in pieces:
            mine = is_mine[first : first + len(piece.samples)]
            parts.append(gather(piece.source, piece.samples.take(mine), (self._seed, piece.epoch, TOKEN_KEY)))
            first += len(piece.samples)
        return parts[0] if len(parts) == 1 else _concatenate(parts)


def _concatenate(parts: Sequence[HistoryBatch]) -> HistoryBatch:
    return dataclasses.replace(
        parts[0],
        user_rows=np.concatenate([part.user_rows for part in parts]),
        items=np.concatenate([part.items for part in parts]),
        offsets=concatenate_offsets([part.offsets for part in parts]),
        context={name: np.concatenate([part.context[name] for part in parts]) for name in parts[0].context},
        targets=np.concatenate([part.targets for part in parts]),
        target_offsets=concatenate_offsets([part.target_offsets for part in parts]),
        token_keys=np.concatenate([part.token_keys for part in parts]),
        seen_offsets=concatenate_offsets([part.seen_offsets for part in parts]),
    )


def iterate_train_items(dataset: PreparedDataset) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The training events of each shard as ``offsets (U + 1,)`` and ``items (E,)``, both int64, oldest first."""
    for shard in dataset.iterate_shards():
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(shard.validation_begin)])
        yield offsets, shard.items[shard.is_training()]
