"""The generative retriever: sharded tables, hybrid encoder, semantic-ID decoder."""

# B rows, L history tokens, S targets, C code levels, M beams, D model width (docs/shapes.md)

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import ModelConfig
from gbla_rec.models.decoder import DecoderMemory, SemanticIdDecoder
from gbla_rec.models.encoder import HybridEncoder
from gbla_rec.models.history_input import HasValues, HistoryInput
from gbla_rec.models.losses import semantic_id_nll
from gbla_rec.models.table_boundary import TableBoundary

if TYPE_CHECKING:
    from gbla_rec.data.batch import Batch


class HistoryModel(nn.Module):
    """The dense part: everything after the tables. One module, so that TorchRec's pipeline traces around it."""

    item_codes: Tensor

    def __init__(self, config: ModelConfig, features: list[str], item_codes: Tensor, widths: tuple[int, ...], backend: Backend) -> None:
        super().__init__()
        dim = config.encoder.model_dim
        self.config = config
        self.input = HistoryInput(features, config.embedding.dim, widths, config.embedding.semantic_code_dim, dim)
        self.encoder = HybridEncoder(config.encoder, backend=backend)
        self.decoder = SemanticIdDecoder(dim, widths, config.decoder, backend=backend)
        # not saved: the table of semantic IDs is an artifact of its own
        self.register_buffer("item_codes", item_codes, persistent=False)

    def encode(self, embedded: Mapping[str, HasValues], items: Tensor, layout: JaggedLayout, token_keys: Tensor | None) -> DecoderMemory:
        """Embedded histories to the decoder's memory."""
        tokens = self.input(embedded, self.item_codes[items])
        encoded = self.encoder(tokens, layout.offsets, layout=layout, token_keys=token_keys)
        return self.decoder.remember(encoded, layout)

    def forward(self, embedded: Mapping[str, HasValues], batch: "Batch") -> tuple[Tensor, Tensor]:
        """Loss (scalar, already weighted by ``batch.loss_weight``) and the targets' NLL ``(S,)`` in nats, detached."""
        memory = self.encode(embedded, batch.items, batch.layout, batch.token_keys)
        codes = self.item_codes[batch.targets]
        logits = self.decoder(codes, batch.code_layout, memory, batch.target_keys if self.training else None)
        smoothing = self.config.decoder.label_smoothing if self.training else 0.0
        nll = semantic_id_nll(logits, codes, label_smoothing=smoothing)
        return nll.sum() * batch.loss_weight, nll.detach()


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
        return self.history(self.table_boundary(self.tables(batch.features)), batch)  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, batch: "Batch") -> DecoderMemory:
        """The memory of the batch's histories, for beam search."""
        return self.history.encode(self.tables(batch.features), batch.items, batch.layout, None)

    @torch.no_grad()
    def next_log_probs(self, prefixes: Tensor, beam_layout: JaggedLayout, memory: DecoderMemory) -> Tensor:
        """See ``SemanticIdDecoder.next_log_probs``."""
        return self.history.decoder.next_log_probs(prefixes, beam_layout, memory)
