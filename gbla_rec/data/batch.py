"""Collate: from a jagged batch of histories to the tensors of one training or evaluation step."""

# B rows, L history tokens, S targets, C code levels, P queries, F features (docs/shapes.md)

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor
from torchrec.streamable import Pipelineable

from gbla_kernels import JaggedLayout
from gbla_rec.config import EmbeddingConfig
from gbla_rec.data.hashing import hash_rows
from gbla_rec.data.histories import HistoryBatch, StreamPosition
from gbla_rec.data.item_queries import ItemQueries, QueryMaker


def hash_feature(index: int) -> str:
    """Name of the feature and table of hash function ``index``."""
    return f"item_hash_{index}"


def context_feature(column: str) -> str:
    """Name of the feature and table of a context column."""
    return f"context_{column}"


def feature_names(config: EmbeddingConfig) -> list[str]:
    """Keys of ``Batch.features``, in order: hashes, then context columns."""
    return [hash_feature(i) for i in range(config.num_item_tables)] + [context_feature(column) for column in config.context_features]


def looked_up_features(config: EmbeddingConfig) -> list[str]:
    """The keys that have ids: all, or those of context columns if item ids are not read."""
    return feature_names(config)[0 if config.reads_item_ids else config.num_item_tables :]


IDS_PER_RUN = 16
"""fbgemm's kernel gives a warp to each row: long histories in one piece would take a few warps of a GPU, and tens of milliseconds."""


@dataclass
class Batch(Pipelineable):
    """One rank's part of a global batch.

    Attributes:
        features: keys of ``feature_names``, each with ``L`` values, the histories, and one for each candidate of ``queries``, or none
            if it is not among ``looked_up_features``: ready for the tables. Its rows are runs of ``IDS_PER_RUN`` ids, whatever the rows
            of the histories: the tables know ids only, and look up the ids of a row one by one.
        items: ``(L,)`` int64 item indices of the histories.
        layout: rows of the encoder's tokens: the histories, with ``C`` tokens for each event where its codes are read as tokens.
        targets: ``(S,)`` int64 item indices to predict.
        code_layout: rows of the ``(S * C,)`` target code positions.
        token_keys: int64 keys of the dropout masks, one for each token of ``layout``; ``target_keys`` ``(S,)`` likewise.
        loss_weight: ranks / targets of the global batch: makes the mean of rank gradients the gradient of the global mean.
        next_position: where the stream goes on after this global batch; None in evaluation.
        num_global_targets: predictions of the global batch: its targets, or its events where every event predicts the next.
        num_global_tokens: history events of the global batch.
        queries: what the item-level head predicts; None without such a head.
    """

    features: KeyedJaggedTensor
    items: Tensor
    layout: JaggedLayout
    targets: Tensor
    code_layout: JaggedLayout
    token_keys: Tensor
    target_keys: Tensor
    loss_weight: float
    next_position: StreamPosition | None
    num_global_targets: int
    num_global_tokens: int
    queries: ItemQueries | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":
        """The batch on ``device``."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=non_blocking) for name in self._movable()})

    def pin_memory(self) -> "Batch":
        """The batch in page-locked memory."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in self._movable()})

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep device memory until ``stream`` has passed this point."""
        for name in self._movable():
            getattr(self, name).record_stream(stream)

    def _movable(self) -> tuple[str, ...]:
        return _MOVABLE if self.queries is None else (*_MOVABLE, "queries")


_MOVABLE = ("features", "items", "layout", "targets", "code_layout", "token_keys", "target_keys")
assert set(_MOVABLE) < {field.name for field in fields(Batch)}


class Collator:
    """Turns ``HistoryBatch`` into ``Batch``; hashing happens here, on the CPU, where TorchRec's pipeline can overlap it."""

    def __init__(
        self,
        config: EmbeddingConfig,
        item_ids: list[int] | list[str] | NDArray[np.int64],
        *,
        num_code_levels: int,
        world_size: int = 1,
        query_maker: QueryMaker | None = None,
    ) -> None:
        """``item_ids``: ``(N,)`` original ids in item-index order; ``query_maker``: where the model has an item-level head."""
        self.config, self.query_maker = config, query_maker
        self.num_code_levels, self.world_size = num_code_levels, world_size
        self.hash_rows = torch.from_numpy(hash_rows(item_ids, config.num_item_tables, config.rows_per_item_table, config.hash_seed))
        self.features = feature_names(config)
        self.tokens_per_event = config.tokens_per_event(num_code_levels)

    def __call__(self, histories: HistoryBatch, *, with_queries: bool = True) -> Batch:
        """Build the tensors of one step on the CPU; without queries for a search, which needs no candidates and no loss."""
        items = torch.from_numpy(histories.items)
        # a rank without rows gets one empty row
        offsets = _at_least_one_row(torch.from_numpy(histories.offsets))
        target_offsets = _at_least_one_row(torch.from_numpy(histories.target_offsets))
        user_rows = torch.from_numpy(histories.user_rows) if len(histories.user_rows) else torch.zeros(1, dtype=torch.int64)
        lengths = offsets.diff()
        queries = self.query_maker(histories) if with_queries and self.query_maker is not None else None
        context = {column: torch.from_numpy(histories.context[column]).to(torch.int64) for column in self.config.context_features}
        target_lengths = target_offsets.diff()
        token_keys = torch.from_numpy(histories.token_keys)
        num_predictions = histories.global_num_tokens if self._predicts_events(histories) else histories.global_num_targets
        return Batch(
            features=self._features(items if queries is None else torch.cat([items, queries.candidates]), context),
            items=items,
            layout=JaggedLayout.from_lengths(lengths * self.tokens_per_event),
            targets=torch.from_numpy(histories.targets),
            code_layout=JaggedLayout.from_lengths(target_lengths * self.num_code_levels),
            token_keys=(token_keys[:, None] + torch.arange(self.tokens_per_event)).flatten(),
            target_keys=_target_keys(token_keys, offsets, target_lengths, user_rows),
            loss_weight=self.world_size / max(num_predictions, 1),
            next_position=histories.next_position,
            num_global_targets=num_predictions,
            num_global_tokens=histories.global_num_tokens,
            queries=queries,
        )

    def item_features(self, items: Tensor) -> KeyedJaggedTensor:
        """Items on their own ``(n,)`` int64, without a context, ready for the tables."""
        return self._features(items, {})

    def _features(self, items: Tensor, context: Mapping[str, Tensor]) -> KeyedJaggedTensor:
        """One value for each item; context values belong to the first items, the others get value 0, which nothing reads."""
        # a table that is not read gets no ids, but its runs: TorchRec exchanges batches of one stride
        ids, runs = items if self.config.reads_item_ids else items[:0], _runs(items.numel())
        run_lengths = [runs if self.config.reads_item_ids else torch.zeros_like(runs)] * len(self.hash_rows)
        run_lengths += [runs] * len(self.config.context_features)
        values = [row_of_item[ids] for row_of_item in self.hash_rows]
        for column in self.config.context_features:
            known = context.get(column, items[:0])
            values.append(torch.cat([known, known.new_zeros(items.numel() - known.numel())]))
        return KeyedJaggedTensor(keys=self.features, values=torch.cat(values), lengths=torch.cat(run_lengths))

    def _predicts_events(self, histories: HistoryBatch) -> bool:
        return self.query_maker is not None and self.query_maker.asks_every_event(histories)


def _runs(num_ids: int) -> Tensor:
    """Lengths of runs, int64; one at least, since TorchRec cannot exchange a batch of stride 0."""
    full, rest = divmod(num_ids, IDS_PER_RUN)
    lengths = torch.full((full + 1,), IDS_PER_RUN)
    lengths[-1] = rest
    return lengths


def _at_least_one_row(offsets: Tensor) -> Tensor:
    return offsets if offsets.numel() > 1 else torch.zeros(2, dtype=torch.int64)


def _target_keys(token_keys: Tensor, offsets: Tensor, target_lengths: Tensor, user_rows: Tensor) -> Tensor:
    """``(S,)``: the key of the row's newest token (of the user, if there is none), counted up over the row's targets."""
    is_empty = offsets.diff() == 0
    row_keys = user_rows.clone()
    row_keys[~is_empty] = token_keys[offsets[1:][~is_empty] - 1]
    rows = torch.repeat_interleave(target_lengths)
    index_in_row = torch.arange(rows.numel()) - (target_lengths.cumsum(0) - target_lengths)[rows]
    # odd multiplier far from small strides: code positions of one target add 0..C-1
    return row_keys[rows] + (index_in_row + 1) * 0x2545F4914F6CDD1D
