"""One layer of the decoder: causal self-attention over the code prefix, cross-attention over the memory, SwiGLU."""

# S targets (or beams), C code positions, l of them before the newest, L memory tokens, D model width, H heads (docs/shapes.md)

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention_packed, keyed_dropout
from gbla_rec.config import DecoderConfig
from gbla_rec.models.jagged_attention import jagged_attention
from gbla_rec.models.layers import RMSNorm, SwiGLU, initialized_linear

FIRST_SALT = 1001
"""Of the decoder's dropout masks: beyond those of any encoder, two for each layer."""


@dataclass(frozen=True, eq=False)
class DecoderMemory:
    """Keys and values ``(L, 2, H, D / H)`` of the encoded histories for each layer of the decoder, computed once per batch."""

    key_values: tuple[Tensor, ...]
    layout: JaggedLayout

    @property
    def device(self) -> torch.device:
        """Where keys and values lie."""
        return self.key_values[0].device


class DecoderLayer(nn.Module):
    """Pre-norm layer on the code positions of each target; a target sees its own positions and its row's memory only."""

    def __init__(self, model_dim: int, config: DecoderConfig, index: int, backend: Backend) -> None:
        super().__init__()
        self.config, self.index, self.backend = config, index, backend
        self.head_dim = model_dim // config.num_heads
        # the residual stream keeps its variance, however many layers add to it
        output_scale = 0.5 * config.num_layers**-0.5
        self.self_norm = RMSNorm(model_dim)
        self.self_projection = initialized_linear(model_dim, 3 * model_dim)
        self.self_output = initialized_linear(model_dim, model_dim, scale=output_scale)
        self.cross_norm = RMSNorm(model_dim)
        self.cross_query = initialized_linear(model_dim, model_dim)
        self.memory_projection = initialized_linear(model_dim, 2 * model_dim)
        self.cross_output = initialized_linear(model_dim, model_dim, scale=output_scale)
        self.ffn_norm = RMSNorm(model_dim)
        ffn_dim = config.ffn_dim if config.ffn_dim is not None else 2 * model_dim
        self.ffn = SwiGLU(model_dim, ffn_dim, output_scale=output_scale)

    def remember(self, memory: Tensor) -> Tensor:
        """Keys and values ``(L, 2, H, D / H)`` of the encoder's output ``(L, D)``."""
        return self.memory_projection(memory).view(memory.shape[0], 2, self.config.num_heads, self.head_dim)  # type: ignore[no-any-return]

    def forward(self, x: Tensor, layout: JaggedLayout, memory: DecoderMemory, keys: Tensor | None) -> Tensor:
        """All positions of each target at once, for training.

        Args:
            x: ``(S, C, D)``.
            layout: rows of the flattened ``(S * C,)`` positions.
            memory: of all layers.
            keys: ``(S * C,)`` int64 for dropout; None switches it off.

        Returns:
            ``(S, C, D)``.
        """
        x = x + self._self_attention(x)
        return self._read_memory(x.flatten(0, 1), layout, memory, keys).view_as(x)

    def step(self, x: Tensor, earlier: Tensor | None, layout: JaggedLayout, memory: DecoderMemory) -> tuple[Tensor, Tensor]:
        """The newest position of each beam, for decoding code by code.

        Args:
            x: ``(S, D)``, the newest position.
            earlier: ``(S, l, 2, H, D / H)``, self-attention keys and values of the positions before it; None if there are none.
            layout: rows of the ``S`` beams.
            memory: of all layers.

        Returns:
            ``(S, D)``, and ``earlier`` with those of this position appended, ``(S, l + 1, 2, H, D / H)``.
        """
        query, newest = self._project(self.self_norm(x)).split((1, 2), dim=1)
        key_values = newest[:, None] if earlier is None else torch.cat([earlier, newest[:, None]], dim=1)
        key, value = key_values.unbind(2)
        # one query and a few keys for each of a hundred thousand beams: sums, not as many products of tiny matrices
        scores = (query.float() * self.head_dim**-0.5 * key.float()).sum(dim=-1, keepdim=True)
        attended = (scores.softmax(dim=1) * value).sum(dim=1).to(value.dtype)
        return self._read_memory(x + self.self_output(attended.flatten(1)), layout, memory, None), key_values

    def _project(self, x: Tensor) -> Tensor:
        """Query, key and value ``(..., 3, H, D / H)`` of ``(..., D)``."""
        return self.self_projection(x).unflatten(-1, (3, self.config.num_heads, self.head_dim))  # type: ignore[no-any-return]

    def _self_attention(self, x: Tensor) -> Tensor:
        """Causal attention among the positions of a target."""
        query, key, value = self._project(self.self_norm(x)).permute(2, 0, 3, 1, 4).unbind(0)
        # spelled out: no fused kernel is made for rows of a few codes
        scores = ((query * self.head_dim**-0.5) @ key.transpose(-1, -2)).float()
        is_later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        attended = scores.masked_fill(is_later, -torch.inf).softmax(dim=-1).to(value.dtype) @ value
        return self.self_output(attended.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _read_memory(self, x: Tensor, layout: JaggedLayout, memory: DecoderMemory, keys: Tensor | None) -> Tensor:
        query = self.cross_query(self.cross_norm(x)).view(x.shape[0], self.config.num_heads, self.head_dim)
        key_value = memory.key_values[self.index]
        if self.backend is Backend.TRITON:
            attended = jagged_cross_attention_packed(query, key_value, layout, memory.layout, backend=self.backend)
        else:
            key, value = key_value.unbind(1)
            attended = jagged_attention(query, key, value, layout, memory.layout)
        x = self._add(x, self.cross_output(attended.flatten(1)), keys, 2 * self.index)
        return self._add(x, self.ffn(self.ffn_norm(x)), keys, 2 * self.index + 1)

    def _add(self, x: Tensor, update: Tensor, keys: Tensor | None, salt: int) -> Tensor:
        return keyed_dropout(update, keys, self.config.dropout, FIRST_SALT + salt, residual=x, backend=self.backend)
