"""The retriever: sharded tables, hybrid encoder, and a semantic-ID decoder, an item-level head, or both."""

# B rows, L history tokens, S targets, P queries, C code levels, M beams, D model width (docs/shapes.md)

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import ModelConfig
from gbla_rec.models.code_input import token_input
from gbla_rec.models.decoder import BeamCache, DecoderMemory, SemanticIdDecoder
from gbla_rec.models.encoder import HybridEncoder
from gbla_rec.models.history_input import HistoryInput
from gbla_rec.models.item_head import ItemHead
from gbla_rec.models.losses import semantic_id_nll
from gbla_rec.models.step_parts import step_part
from gbla_rec.models.table_boundary import HasValues, TableBoundary

if TYPE_CHECKING:
    from gbla_rec.data.batch import Batch
    from gbla_rec.data.item_queries import ItemQueries

MAX_GRAPHS = 32
"""Graphs of a compiled dense part: kernels of attention (5) times those of cross-attention (3), with and without gradients."""
MIN_COMPILED = 16
"""Tokens and targets of a batch that runs compiled: sizes of 0 and 1, and rows shorter than a convolution, are graphs of their own."""


@dataclass(frozen=True, eq=False)
class EncodedHistories:
    """What a batch of histories is searched with.

    Attributes:
        memory: what the decoder reads; None without a decoder.
        queries: ``(B, D)`` of the item-level head, of the newest event of each row, zero for an empty row; None without such a head.
    """

    memory: DecoderMemory | None
    queries: Tensor | None


class HistoryModel(nn.Module):
    """The dense part: everything after the tables. One module, so that TorchRec's pipeline traces around it."""

    item_codes: Tensor
    item_features: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        features: list[str],
        item_codes: Tensor,
        widths: tuple[int, ...],
        backend: Backend,
        item_features: Tensor | None = None,
    ) -> None:
        super().__init__()
        dim = config.encoder.model_dim
        self.config = config
        feature_dim = 0 if item_features is None else item_features.shape[1]
        self.input = token_input(config.embedding, features, widths, dim, feature_dim=feature_dim, backend=backend)
        self.encoder = HybridEncoder(config.encoder, backend=backend)
        self.decoder = SemanticIdDecoder(dim, widths, config.decoder, backend=backend) if config.has_decoder else None
        self.item_head = ItemHead(dim, config.item_head) if config.has_item_head else None
        # not saved: semantic IDs and features are artifacts of their own
        self.register_buffer("item_codes", item_codes, persistent=False)
        self.register_buffer("item_features", item_features, persistent=False)
        self._compiled: Callable[..., Tensor] | None = None

    def encode(self, embedded: Mapping[str, HasValues], items: Tensor, layout: JaggedLayout) -> EncodedHistories:
        """Embedded histories of ``items`` ``(L,)`` to what searches read; in evaluation mode."""
        encoded, _ = self._encode([embedded[name].values() for name in self.input.features], items, layout, None)
        memory = None if self.decoder is None else self.decoder.remember(encoded, layout)
        queries = None if self.item_head is None else self.item_head.newest_query(encoded, layout.offsets)
        return EncodedHistories(memory, queries)

    def item_vectors(self, embedded: Mapping[str, HasValues], items: Tensor) -> Tensor:
        """Vectors ``(n, D)`` of ``items`` ``(n,)`` for the item-level head."""
        return self._items([embedded[name].values() for name in self.input.features], items)

    def forward(self, embedded: Mapping[str, HasValues], batch: "Batch") -> tuple[Tensor, Tensor]:
        """Loss (scalar, already weighted by ``batch.loss_weight``) and the NLL of the predictions ``(S,)`` in nats, detached.

        Where only the item-level head predicts, there is one NLL for each of its queries, ``(P,)``.
        """
        # read here: TorchRec's awaitables end where a compiler begins
        with step_part("tables"):
            rows = [embedded[name].values() for name in self.input.features]
        tensors = (batch.items, batch.token_keys, batch.targets, batch.target_keys)
        asked = () if batch.queries is None else (batch.queries.positions, batch.queries.labels)
        target_nll = self.target_nll
        if self._compiled is not None and self.training and min(part.shape[0] for part in (*tensors, *asked)) >= MIN_COMPILED:
            for tensor in (*rows, *tensors, *asked):
                # else a compiler takes two sizes for one if they are equal in the first batch
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            target_nll = self._compiled
        nll = target_nll(rows, *tensors, batch.layout, batch.code_layout, batch.queries)
        return nll.sum() * batch.loss_weight, nll.detach()

    def target_nll(
        self,
        rows: list[Tensor],
        items: Tensor,
        token_keys: Tensor,
        targets: Tensor,
        target_keys: Tensor,
        layout: JaggedLayout,
        code_layout: JaggedLayout,
        queries: "ItemQueries | None" = None,
    ) -> Tensor:
        """NLL of the predictions in nats: everything of a step that is neither tables nor optimiser.

        Args:
            rows: ``(L + candidates, table_dim)`` of each feature, no rows of one that is not looked up; all else as in ``Batch``.
            items: ``(L,)``.
            token_keys: one for each token of ``layout``.
            targets: ``(S,)``.
            target_keys: ``(S,)``.
            layout: of the encoder's tokens.
            code_layout: of the targets' codes.
            queries: of the item-level head.

        Returns:
            ``(S,)`` fp32, or ``(P,)`` where only the item-level head predicts.
        """
        encoded, candidate_rows = self._encode(rows, items, layout, token_keys)
        losses = []
        if self.decoder is not None:
            losses.append(self._code_nll(self.decoder, encoded, targets, target_keys, layout, code_layout))
        if self.item_head is not None:
            assert queries is not None
            with step_part("item_head"):
                vectors = self._items(candidate_rows, queries.candidates)
                asking = self.item_head.query(encoded, queries.positions)
                nll = self.item_head.nll(asking, queries.labels, vectors, queries.candidates, queries.log_expected)
            losses.append(nll * self.config.item_head.weight if losses else nll)
        return sum(losses[1:], losses[0])

    def compile_training(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile ``target_nll`` for training: one graph, with symbolic sizes, whatever the lengths of a batch."""
        # DDP's splitter refuses recomputed layers; one backward means that its all-reduce starts when that ends
        torch._dynamo.config.optimize_ddp = False
        # the config's floats are constants: as inputs, they cost a second analysis of the whole graph
        torch._dynamo.config.specialize_float = True
        # torch's default of 8 would end a run whose batches ask for more combinations of kernels than that
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_GRAPHS)
        self._compiled = torch.compile(self.target_nll, backend=backend, dynamic=True, fullgraph=True)

    def stop_compiling(self) -> None:
        """Train in eager mode from here on."""
        self._compiled = None

    def _encode(self, rows: list[Tensor], items: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """The encoded histories ``(L, D)``, and the rows of the candidates that follow them."""
        num_events = items.shape[0]
        with step_part("input"):
            keys = token_keys if self.training else None
            tokens = self.input([row[:num_events] for row in rows], self.item_codes[items], self._features_of(items), keys)
        return self.encoder(tokens, layout.offsets, layout=layout, token_keys=token_keys), [row[num_events:] for row in rows]

    def _items(self, rows: list[Tensor], items: Tensor) -> Tensor:
        assert isinstance(self.input, HistoryInput), "ModelConfig refuses to score items where tokens are codes"
        return self.input.items(rows, self.item_codes[items], self._features_of(items))

    def _features_of(self, items: Tensor) -> Tensor | None:
        return None if self.item_features is None else self.item_features[items]

    def _code_nll(
        self,
        decoder: SemanticIdDecoder,
        encoded: Tensor,
        targets: Tensor,
        target_keys: Tensor,
        layout: JaggedLayout,
        code_layout: JaggedLayout,
    ) -> Tensor:
        codes = self.item_codes[targets]
        with step_part("decoder"):
            memory = decoder.remember(encoded, layout)
            logits = decoder(codes, code_layout, memory, target_keys if self.training else None)
        smoothing = self.config.decoder.label_smoothing if self.training else 0.0
        with step_part("loss"):
            return semantic_id_nll(logits, codes, label_smoothing=smoothing)


class GenerativeRetriever(nn.Module):
    """Reads histories and generates the semantic IDs of the next items, or scores whole items.

    ``forward`` is one training step's loss. ``encode`` and ``next_log_probs`` are the two halves of beam search; the queries of
    ``encode`` against ``item_vectors`` are item-level scores.
    """

    def __init__(
        self,
        tables: nn.Module,
        config: ModelConfig,
        features: list[str],
        item_codes: Tensor,
        widths: tuple[int, ...],
        *,
        backend: Backend,
        item_features: Tensor | None = None,
    ) -> None:
        """Join the parts.

        Args:
            tables: an ``EmbeddingCollection`` over ``features``, sharded or not.
            config: the model.
            features: keys of the tables, in the order of concatenation.
            item_codes: ``(N, C)`` int64 semantic IDs.
            widths: codes of each level, ``C`` entries.
            backend: of the encoder's kernels and of the decoder's attention over the memory.
            item_features: ``(N, F)`` fp32, where ``config.embedding.item_features`` reads them.
        """
        super().__init__()
        self.tables = tables
        self.table_boundary = TableBoundary()
        self.history = HistoryModel(config, features, item_codes, widths, backend, item_features)

    def forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """See ``HistoryModel.forward``."""
        with step_part("tables"):
            embedded = self.tables(batch.features)
        return self.history(self.table_boundary(embedded), batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, batch: "Batch") -> EncodedHistories:
        """What searches read of the batch's histories."""
        return self.history.encode(self.tables(batch.features), batch.items, batch.layout)

    @torch.no_grad()
    def item_vectors(self, features: Any, items: Tensor) -> Tensor:
        """Vectors ``(n, D)`` that the item-level head scores; every rank must call it as often as the others.

        Args:
            features: a ``KeyedJaggedTensor`` from ``Collator.item_features``.
            items: ``(n,)`` int64 item indices.
        """
        return self.history.item_vectors(self.tables(features), items)

    @torch.no_grad()
    def next_log_probs(
        self, prefixes: Tensor, parents: Tensor, cache: BeamCache | None, beam_layout: JaggedLayout, memory: DecoderMemory
    ) -> tuple[Tensor, BeamCache]:
        """See ``SemanticIdDecoder.next_log_probs``.

        Raises:
            ValueError: if the model has no decoder.
        """
        if self.history.decoder is None:
            raise ValueError("ModelConfig.objective must be 'generative' or 'joint' to generate semantic IDs, got 'item'")
        return self.history.decoder.next_log_probs(prefixes, parents, cache, beam_layout, memory)
