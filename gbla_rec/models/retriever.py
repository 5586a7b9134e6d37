"""The generative retriever: sharded tables, hybrid encoder, semantic-ID decoder."""

# B rows, L history tokens, S targets, C code levels, M beams, D model width (docs/shapes.md)

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import ModelConfig
from gbla_rec.models.code_input import token_input
from gbla_rec.models.decoder import DecoderMemory, SemanticIdDecoder
from gbla_rec.models.encoder import HybridEncoder
from gbla_rec.models.losses import semantic_id_nll
from gbla_rec.models.step_parts import step_part
from gbla_rec.models.table_boundary import HasValues, TableBoundary

if TYPE_CHECKING:
    from gbla_rec.data.batch import Batch

MIN_COMPILED = 16
"""Tokens and targets of a batch that runs compiled: sizes of 0 and 1, and rows shorter than a convolution, are graphs of their own."""


class HistoryModel(nn.Module):
    """The dense part: everything after the tables. One module, so that TorchRec's pipeline traces around it."""

    item_codes: Tensor

    def __init__(self, config: ModelConfig, features: list[str], item_codes: Tensor, widths: tuple[int, ...], backend: Backend) -> None:
        super().__init__()
        dim = config.encoder.model_dim
        self.config = config
        self.input = token_input(config.embedding, features, widths, dim)
        self.encoder = HybridEncoder(config.encoder, backend=backend)
        self.decoder = SemanticIdDecoder(dim, widths, config.decoder, backend=backend)
        # not saved: the table of semantic IDs is an artifact of its own
        self.register_buffer("item_codes", item_codes, persistent=False)
        self._compiled: Callable[..., Tensor] | None = None

    def encode(self, embedded: Mapping[str, HasValues], items: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> DecoderMemory:
        """Embedded histories to the decoder's memory."""
        return self._remember([embedded[name].values() for name in self.input.features], items, layout, token_keys)

    def forward(self, embedded: Mapping[str, HasValues], batch: "Batch") -> tuple[Tensor, Tensor]:
        """Loss (scalar, already weighted by ``batch.loss_weight``) and the targets' NLL ``(S,)`` in nats, detached."""
        # read here: TorchRec's awaitables end where a compiler begins
        with step_part("tables"):
            rows = [embedded[name].values() for name in self.input.features]
        tensors = (batch.items, batch.token_keys, batch.targets, batch.target_keys)
        target_nll = self.target_nll
        if self._compiled is not None and self.training and min(batch.items.numel(), batch.targets.numel()) >= MIN_COMPILED:
            for tensor in (*rows, *tensors):
                # else a compiler takes two sizes for one if they are equal in the first batch
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
            target_nll = self._compiled
        nll = target_nll(rows, *tensors, batch.layout, batch.code_layout)
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
    ) -> Tensor:
        """NLL of the targets ``(S,)`` in nats: everything of a step that is neither tables nor optimiser.

        Args:
            rows: ``(L, table_dim)`` of each feature, no rows of one that is not looked up; all else as in ``Batch``.
            items: ``(L,)``.
            token_keys: one for each token of ``layout``.
            targets: ``(S,)``.
            target_keys: ``(S,)``.
            layout: of the encoder's tokens.
            code_layout: of the targets' codes.
        """
        memory = self._remember(rows, items, layout, token_keys)
        codes = self.item_codes[targets]
        with step_part("decoder"):
            logits = self.decoder(codes, code_layout, memory, target_keys if self.training else None)
        smoothing = self.config.decoder.label_smoothing if self.training else 0.0
        with step_part("loss"):
            return semantic_id_nll(logits, codes, label_smoothing=smoothing)

    def compile_training(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile ``target_nll`` for training: one graph, with symbolic sizes, whatever the lengths of a batch."""
        # DDP's splitter refuses recomputed layers; one backward means that its all-reduce starts when that ends
        torch._dynamo.config.optimize_ddp = False
        # the config's floats are constants: as inputs, they cost a second analysis of the whole graph
        torch._dynamo.config.specialize_float = True
        self._compiled = torch.compile(self.target_nll, backend=backend, dynamic=True, fullgraph=True)

    def stop_compiling(self) -> None:
        """Train in eager mode from here on."""
        self._compiled = None

    def _remember(self, rows: list[Tensor], items: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> DecoderMemory:
        with step_part("input"):
            tokens = self.input(rows, self.item_codes[items])
        encoded = self.encoder(tokens, layout.offsets, layout=layout, token_keys=token_keys)
        with step_part("decoder"):
            return self.decoder.remember(encoded, layout)


class GenerativeRetriever(nn.Module):
    """Reads histories and generates the semantic IDs of the next items.

    ``forward`` is one training step's loss. ``encode`` and ``next_log_probs`` are the two halves of beam search.
    """

    def __init__(
        self,
        tables: nn.Module,
        config: ModelConfig,
        features: list[str],
        item_codes: Tensor,
        widths: tuple[int, ...],
        *,
        backend: Backend = Backend.REFERENCE,
    ) -> None:
        """Join the parts.

        Args:
            tables: an ``EmbeddingCollection`` over ``features``, sharded or not.
            config: the model.
            features: keys of the tables, in the order of concatenation.
            item_codes: ``(N, C)`` int64 semantic IDs.
            widths: codes of each level, ``C`` entries.
            backend: of the encoder's kernels and of the decoder's attention over the memory.
        """
        super().__init__()
        self.tables = tables
        self.table_boundary = TableBoundary()
        self.history = HistoryModel(config, features, item_codes, widths, backend)

    def forward(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """See ``HistoryModel.forward``."""
        with step_part("tables"):
            embedded = self.tables(batch.features)
        return self.history(self.table_boundary(embedded), batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, batch: "Batch") -> DecoderMemory:
        """The memory of the batch's histories, for beam search."""
        return self.history.encode(self.tables(batch.features), batch.items, batch.layout, None)

    @torch.no_grad()
    def next_log_probs(self, prefixes: Tensor, beam_layout: JaggedLayout, memory: DecoderMemory) -> Tensor:
        """See ``SemanticIdDecoder.next_log_probs``."""
        return self.history.decoder.next_log_probs(prefixes, beam_layout, memory)
