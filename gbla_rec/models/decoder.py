"""The one-layer decoder of semantic IDs: causal self-attention over the code prefix, cross-attention over the memory."""

# B rows, L memory tokens, S targets, C code levels, W codebook width, D model width, H heads, M beams (docs/shapes.md)

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention_packed
from gbla_rec.config import DecoderConfig
from gbla_rec.models.jagged_attention import jagged_attention
from gbla_rec.models.keyed_dropout import keyed_dropout
from gbla_rec.models.layers import RMSNorm, SwiGLU, initialized_linear


@dataclass(frozen=True, eq=False)
class DecoderMemory:
    """Keys and values ``(L, 2, H, D / H)`` of the encoded histories, computed once per batch."""

    key_value: Tensor
    layout: JaggedLayout


class SemanticIdDecoder(nn.Module):
    """Predicts the code of each level from the codes before it and the encoded history.

    Each target is decoded independently against its row's memory: targets of one row never see each other.
    """

    def __init__(self, model_dim: int, widths: tuple[int, ...], config: DecoderConfig, *, backend: Backend = Backend.REFERENCE) -> None:
        """Make the layers.

        Args:
            model_dim: ``D``.
            widths: number of codes of each level, ``C`` entries.
            config: of the decoder.
            backend: of the attention over the memory: ``TRITON`` splits the keys of a row over the GPU, ``REFERENCE`` runs
                ``jagged_attention``.
        """
        super().__init__()
        self.config, self.widths, self.backend = config, widths, backend
        self.head_dim = model_dim // config.num_heads
        self.start = nn.Parameter(torch.zeros(model_dim))
        self.code_embeddings = nn.ModuleList(nn.Embedding(width, model_dim) for width in widths[:-1])
        for embedding in self.code_embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=0.5)
        self.level_embedding = nn.Parameter(0.5 * torch.randn(len(widths), model_dim))
        self.self_norm = RMSNorm(model_dim)
        self.self_projection = initialized_linear(model_dim, 3 * model_dim)
        self.self_output = initialized_linear(model_dim, model_dim, scale=0.5)
        self.cross_norm = RMSNorm(model_dim)
        self.cross_query = initialized_linear(model_dim, model_dim)
        self.memory_projection = initialized_linear(model_dim, 2 * model_dim)
        self.cross_output = initialized_linear(model_dim, model_dim, scale=0.5)
        self.ffn_norm = RMSNorm(model_dim)
        ffn_dim = config.ffn_dim if config.ffn_dim is not None else 2 * model_dim
        self.ffn = SwiGLU(model_dim, ffn_dim, output_scale=0.5)
        self.final_norm = RMSNorm(model_dim)
        self.heads = nn.ModuleList(initialized_linear(model_dim, width, scale=0.5) for width in widths)

    def remember(self, memory: Tensor, layout: JaggedLayout) -> DecoderMemory:
        """Project the encoder's output ``(L, D)`` to cross-attention keys and values."""
        return DecoderMemory(self.memory_projection(memory).view(memory.shape[0], 2, self.config.num_heads, self.head_dim), layout)

    def forward(self, codes: Tensor, code_layout: JaggedLayout, memory: DecoderMemory, token_keys: Tensor | None = None) -> list[Tensor]:
        """Teacher-forced logits of every level.

        Args:
            codes: ``(S, C)`` int64, the targets' semantic IDs.
            code_layout: the rows of the flattened ``(S * C,)`` codes: ``C`` positions per target of a row (possibly none).
            memory: from ``remember``.
            token_keys: ``(S,)`` int64 for dropout; None switches it off.

        Returns:
            ``C`` tensors ``(S, W_level)``; level ``l`` saw the codes of levels ``< l`` only.
        """
        num_levels = len(self.widths)
        x = self._embed(codes[:, : num_levels - 1])
        x = x + self._self_attention(x, x)
        keys = None if token_keys is None else (token_keys[:, None] + torch.arange(num_levels, device=codes.device)).flatten()
        hidden = self._read_memory(x.flatten(0, 1), code_layout, memory, keys).view_as(x)
        return [head(hidden[:, level]) for level, head in enumerate(self.heads)]

    def next_log_probs(self, prefixes: Tensor, beam_layout: JaggedLayout, memory: DecoderMemory) -> Tensor:
        """Log-probabilities of the next level's codes, for beam search.

        Args:
            prefixes: ``(B, M, l)`` int64, the first ``l`` codes of each beam, ``0 <= l < C``.
            beam_layout: ``B`` rows of ``M`` tokens.
            memory: from ``remember``, of ``B`` rows.

        Returns:
            ``(B, M, W_l)`` fp32.
        """
        num_rows, num_beams, level = prefixes.shape
        x = self._embed(prefixes.flatten(0, 1))
        newest = x[:, -1:]
        newest = (newest + self._self_attention(newest, x)).flatten(0, 1)
        hidden = self._read_memory(newest, beam_layout, memory, None)
        logits: Tensor = self.heads[level](hidden)
        return F.log_softmax(logits.float(), dim=-1).view(num_rows, num_beams, -1)

    def _embed(self, codes: Tensor) -> Tensor:
        """``(S, l)`` codes to ``(S, l + 1, D)`` inputs: the start vector, then one token per code."""
        tokens = [self.start.expand(codes.shape[0], -1)]
        tokens += [embedding(codes[:, level]) for level, embedding in zip(range(codes.shape[1]), self.code_embeddings, strict=False)]
        return torch.stack(tokens, dim=1) + self.level_embedding[: len(tokens)]

    def _self_attention(self, queries: Tensor, inputs: Tensor) -> Tensor:
        """Causal attention of the newest ``queries (S, n, D)`` over ``inputs (S, l, D)``, n = l or n = 1."""
        normed = self.self_norm(inputs)
        heads = (inputs.shape[0], inputs.shape[1], 3, self.config.num_heads, self.head_dim)
        query, key, value = self.self_projection(normed).view(heads).permute(2, 0, 3, 1, 4).unbind(0)
        query = query[:, :, -queries.shape[1] :]
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=queries.shape[1] > 1)
        return self.self_output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _read_memory(self, x: Tensor, layout: JaggedLayout, memory: DecoderMemory, keys: Tensor | None) -> Tensor:
        query = self.cross_query(self.cross_norm(x)).view(x.shape[0], self.config.num_heads, self.head_dim)
        if self.backend is Backend.TRITON:
            attended = jagged_cross_attention_packed(query, memory.key_value, layout, memory.layout, backend=self.backend)
        else:
            key, value = memory.key_value.unbind(1)
            attended = jagged_attention(query, key, value, layout, memory.layout)
        dropout = self.config.dropout
        x = x + keyed_dropout(self.cross_output(attended.flatten(1)), keys, dropout, 1001)
        x = x + keyed_dropout(self.ffn(self.ffn_norm(x)), keys, dropout, 1002)
        return self.final_norm(x)  # type: ignore[no-any-return]
