"""What the item-level head predicts in a batch: which tokens ask, for which items, among which candidates."""

# L history tokens, S targets, P queries, N items (docs/shapes.md)

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gbla_rec.config import ItemHeadConfig, ItemLoss
from gbla_rec.data.histories import HistoryBatch, StreamPosition
from gbla_rec.data.keyed_random import keyed_uint64, keyed_uniform

Int64Array = NDArray[np.int64]
NEGATIVES_KEY = 3


@dataclass(frozen=True, eq=False)
class ItemQueries:
    """Queries of one rank's part of a global batch.

    Attributes:
        positions: ``(P,)`` int64 tokens whose encoding asks.
        labels: ``(P,)`` int64 places in ``candidates`` of the items asked for.
        candidates: int64 item indices: the whole catalogue, or the ``P`` items asked for and then negatives.
        log_expected: fp32, of each shared negative the log of how often it is expected among the negatives; empty where none are shared.
    """

    positions: Tensor
    labels: Tensor
    candidates: Tensor
    log_expected: Tensor

    def num_scores(self, loss: ItemLoss) -> int:
        """Products of a query and a candidate that ``loss`` takes."""
        num_queries = self.positions.numel()
        num_shared = self.log_expected.numel()
        if num_shared:
            return num_queries * (1 + num_shared)
        return self.candidates.numel() if loss == "bce" else num_queries * self.candidates.numel()

    def to(self, device: torch.device, non_blocking: bool = False) -> "ItemQueries":
        """The queries on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in _TENSORS})

    def pin_memory(self) -> "ItemQueries":
        """The queries in page-locked memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _TENSORS})

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep device memory until ``stream`` has passed this point."""
        for name in _TENSORS:
            getattr(self, name).record_stream(stream)


_TENSORS = tuple(field.name for field in fields(ItemQueries))


class QueryMaker:
    """Makes the queries of batches. Negatives depend on seed and place in the stream, never on the number of ranks."""

    def __init__(self, config: ItemHeadConfig, num_items: int, num_train_events: Int64Array | None, seed: int) -> None:
        """Draw from a catalogue.

        Args:
            config: the head.
            num_items: ``N``.
            num_train_events: ``(N,)`` training events of each item, for a sampled softmax; None counts all alike.
            seed: of the run.
        """
        self.config, self.num_items, self.seed = config, num_items, seed
        counts = np.zeros(num_items) if num_train_events is None else num_train_events
        weights = (counts + 1.0) ** config.sampling_power
        self.probabilities = weights / weights.sum()
        self.cumulative = np.cumsum(self.probabilities)

    def __call__(self, histories: HistoryBatch) -> ItemQueries:
        """The queries of a batch: in evaluation, and unless the config says otherwise, the last event asks for each target."""
        positions, items = (_next_events if self.asks_every_event(histories) else _targets)(histories)
        log_expected = np.zeros(0, np.float32)
        if self.config.num_sampled == 0:
            candidates, labels = np.arange(self.num_items), items
        else:
            labels = np.arange(len(items))
            if self.config.loss == "bce":
                negatives = self._own_negatives(histories, positions, items)
            else:
                negatives = self._shared_negatives(histories.position or StreamPosition())
                log_expected = np.log(self.config.num_sampled * self.probabilities[negatives]).astype(np.float32)
            candidates = np.concatenate([items, negatives])
        return ItemQueries(*(torch.from_numpy(array) for array in (positions, labels, candidates, log_expected)))

    def asks_every_event(self, histories: HistoryBatch) -> bool:
        """Whether every event of the batch predicts the next one: in training, if the config says so."""
        return self.config.every_position and histories.next_position is not None

    def _shared_negatives(self, at: StreamPosition) -> Int64Array:
        draws = keyed_uniform(self.seed, NEGATIVES_KEY, at.epoch, at.shard, at.sample, np.arange(self.config.num_sampled, dtype=np.int64))
        negatives: Int64Array = np.searchsorted(self.cumulative, draws * self.cumulative[-1], side="right").astype(np.int64)
        return np.minimum(negatives, self.num_items - 1)

    def _own_negatives(self, histories: HistoryBatch, positions: Int64Array, items: Int64Array) -> Int64Array:
        """``(P * num_sampled,)`` uniform items other than the query's own."""
        place = np.arange(len(positions), dtype=np.int64)
        first = np.searchsorted(positions, positions)
        # the keys of tokens are all zero in evaluation: users must not share their negatives
        users = histories.user_rows[np.searchsorted(histories.offsets, positions, side="right") - 1]
        keys = keyed_uint64(self.seed, NEGATIVES_KEY, users, histories.token_keys[positions], place - first)[:, None]
        draws = keyed_uint64(keys.view(np.int64), np.arange(self.config.num_sampled, dtype=np.int64)[None])
        others = (draws % np.uint64(max(self.num_items - 1, 1))).astype(np.int64)
        return (others + (others >= items[:, None])).flatten() % self.num_items


def _targets(histories: HistoryBatch) -> tuple[Int64Array, Int64Array]:
    """The newest event of each row asks for each of the row's targets."""
    return np.repeat(histories.offsets[1:] - 1, np.diff(histories.target_offsets)), histories.targets


def _next_events(histories: HistoryBatch) -> tuple[Int64Array, Int64Array]:
    """Every event asks for the one after it, the newest event of a row for the row's first target."""
    is_newest = np.zeros(len(histories.items), bool)
    is_row = np.diff(histories.offsets) > 0
    is_newest[histories.offsets[1:][is_row] - 1] = True
    items = np.empty_like(histories.items)
    items[~is_newest] = histories.items[np.flatnonzero(~is_newest) + 1]
    items[is_newest] = histories.targets[histories.target_offsets[:-1][is_row]]
    return np.arange(len(items), dtype=np.int64), items
