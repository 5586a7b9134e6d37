"""The decoder of semantic IDs: from the codes before it and the encoded history to the code of each level."""

# B rows, L memory tokens, S targets, C code levels, W codebook width, D model width, H heads, M beams (docs/shapes.md)

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import DecoderConfig
from gbla_rec.models.decoder_layer import DecoderLayer, DecoderMemory
from gbla_rec.models.layers import RMSNorm, initialized_linear

__all__ = ["BeamCache", "DecoderMemory", "SemanticIdDecoder"]


@dataclass(frozen=True, eq=False)
class BeamCache:
    """Self-attention keys and values ``(B, M, l + 1, 2, H, D / H)`` of the start and ``l`` codes of each beam, for each layer."""

    key_values: tuple[Tensor, ...]

    def of(self, parents: Tensor) -> "BeamCache":
        """Those of the beams ``parents`` ``(B, M')``, indices among the ``M`` of each row."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        return BeamCache(tuple(key_value[rows, parents] for key_value in self.key_values))


class SemanticIdDecoder(nn.Module):
    """Predicts the code of each level from the codes before it and the encoded history.

    Each target is decoded independently against its row's memory: targets of one row never see each other.
    """

    def __init__(self, model_dim: int, widths: tuple[int, ...], config: DecoderConfig, *, backend: Backend) -> None:
        """Make the layers.

        Args:
            model_dim: ``D``.
            widths: number of codes of each level, ``C`` entries.
            config: of the decoder.
            backend: of the attention over the memory: ``TRITON`` splits the keys of a row over the GPU, ``REFERENCE`` runs
                ``jagged_attention``.
        """
        super().__init__()
        self.config, self.widths = config, widths
        self.start = nn.Parameter(torch.zeros(model_dim))
        self.code_embeddings = nn.ModuleList(nn.Embedding(width, model_dim) for width in widths[:-1])
        for embedding in self.code_embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=0.5)
        self.level_embedding = nn.Parameter(0.5 * torch.randn(len(widths), model_dim))
        first, *further = (DecoderLayer(model_dim, config, index, backend) for index in range(config.num_layers))
        # the first layer's parts are the decoder's own, so that a decoder of one layer names its parameters without a number
        for name, part in first.named_children():
            self.add_module(name, part)
        self.further_layers = nn.ModuleList(further)
        self._layers = (first, *further)
        self.final_norm = RMSNorm(model_dim)
        self.heads = nn.ModuleList(initialized_linear(model_dim, width, scale=0.5) for width in widths)

    def remember(self, memory: Tensor, layout: JaggedLayout) -> DecoderMemory:
        """Project the encoder's output ``(L, D)`` to each layer's cross-attention keys and values."""
        return DecoderMemory(tuple(layer.remember(memory) for layer in self._layers), layout)

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
        keys = None if token_keys is None else (token_keys[:, None] + torch.arange(num_levels, device=codes.device)).flatten()
        for layer in self._layers:
            x = layer(x, code_layout, memory, keys)
        hidden = self.final_norm(x.flatten(0, 1)).view_as(x)
        return [head(hidden[:, level]) for level, head in enumerate(self.heads)]

    def next_log_probs(
        self, prefixes: Tensor, parents: Tensor, cache: BeamCache | None, beam_layout: JaggedLayout, memory: DecoderMemory
    ) -> tuple[Tensor, BeamCache]:
        """Log-probabilities of the next level's codes, for beam search; each call computes one position of each beam.

        Args:
            prefixes: ``(B, M, l)`` int64, the first ``l`` codes of each beam, ``0 <= l < C``.
            parents: ``(B, M)`` int64, the beam of the call before that each beam goes on from; read from the second call on.
            cache: what the call before returned; None at ``l = 0``.
            beam_layout: ``B`` rows of ``M`` tokens.
            memory: from ``remember``, of ``B`` rows.

        Returns:
            ``(B, M, W_l)`` fp32, and the cache for the next level.

        Raises:
            ValueError: if ``cache`` is not that of prefixes of ``l - 1`` codes.
        """
        num_rows, num_beams, level = prefixes.shape
        num_cached = 0 if cache is None else cache.key_values[0].shape[2]
        if num_cached != level:
            raise ValueError(
                f"cache must be what the call for prefixes of {level - 1} codes returned, with {level} positions (None for no code), "
                f"got {num_cached}"
            )
        newest = self.start if cache is None else self.code_embeddings[level - 1](prefixes[:, :, -1].flatten())
        x = (newest + self.level_embedding[level]).expand(num_rows * num_beams, -1)
        earlier = [None] * len(self._layers) if cache is None else [kept.flatten(0, 1) for kept in cache.of(parents).key_values]
        key_values = []
        for layer, before in zip(self._layers, earlier, strict=True):
            x, kept = layer.step(x, before, beam_layout, memory)
            key_values.append(kept.unflatten(0, (num_rows, num_beams)))
        # logits rounded to bf16 would tie codes that differ, and ties go by code
        with torch.autocast(x.device.type, enabled=False):
            head = self.heads[level]
            assert isinstance(head, nn.Linear)
            logits = F.linear(self.final_norm(x).float(), head.weight.float())
        return F.log_softmax(logits, dim=-1).unflatten(0, (num_rows, num_beams)), BeamCache(tuple(key_values))

    def _embed(self, codes: Tensor) -> Tensor:
        """``(S, l)`` codes to ``(S, l + 1, D)`` inputs: the start vector, then one token per code."""
        tokens = [self.start.expand(codes.shape[0], -1)]
        tokens += [embedding(codes[:, level]) for level, embedding in zip(range(codes.shape[1]), self.code_embeddings, strict=False)]
        return torch.stack(tokens, dim=1) + self.level_embedding[: len(tokens)]
