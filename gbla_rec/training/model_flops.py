"""Model FLOPs of a training step, counted from the config and the lengths of a batch, and what fraction of a GPU's peak that is.

A multiply-add counts two. Backward of a product costs two products of its size, so a step counts three forward passes
(Chowdhery et al., arXiv 2204.02311). Only products count: norms, activations, softmax, the convolution's 4 taps and the tables are
left out, and so is what activation checkpointing computes twice. A causal encoder counts half of its pairs.
"""

# L tokens, T tokens of a row, H heads, K head width, D model width, S targets, C code levels, W codebook width (docs/shapes.md)

from dataclasses import dataclass

import torch
from torch import Tensor

from gbla_kernels import JaggedLayout
from gbla_rec.config import EncoderConfig, ModelConfig

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (NVIDIA's data sheets, without sparsity; SXM)."""
PASSES = 3
"""Forward, and backward at twice its cost."""


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """What the cost of a batch depends on; sizes of several batches add up.

    Attributes:
        tokens: ``L``.
        pairs: pairs of tokens of one row, ``sum T^2``.
        window_pairs: pairs that a windowed layer sees.
        targets: ``S``.
        memory_pairs: pairs of a code position and a memory token of its row.
    """

    tokens: int
    pairs: int
    window_pairs: int
    targets: int
    memory_pairs: int

    @classmethod
    def of(cls, layout: JaggedLayout, code_layout: JaggedLayout, num_targets: int, window: int) -> "BatchSizes":
        """Sizes of a batch from its histories, its code positions and its targets; read on the host."""
        lengths, codes = layout.offsets_cpu.diff(), code_layout.offsets_cpu.diff()
        return cls(
            layout.num_tokens, int(lengths.square().sum()), _window_pairs(lengths, window), num_targets, int((lengths * codes).sum())
        )

    def __add__(self, other: "BatchSizes") -> "BatchSizes":
        return BatchSizes(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.window_pairs + other.window_pairs,
            self.targets + other.targets,
            self.memory_pairs + other.memory_pairs,
        )


def _window_pairs(lengths: Tensor, window: int) -> int:
    """``sum over tokens of the tokens within window on both sides``: ``T (2 w + 1) - w (w + 1)`` for ``T > w``, else ``T^2``."""
    reach = torch.minimum(lengths - 1, torch.tensor(window)).clamp(min=0)
    return int((lengths * (2 * reach + 1) - reach * (reach + 1)).sum())


def training_flops(config: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> int:
    """Model FLOPs of one training step, forward and backward.

    Args:
        config: tables, encoder, decoder.
        widths: codes of each level, ``C`` entries.
        sizes: of the step's batch.
    """
    return PASSES * sum(forward_flops(config, widths, sizes).values())


def forward_flops(config: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> dict[str, int]:
    """Model FLOPs of a forward pass by part: ``input``, ``S``, ``G``, ``W`` (mixing layers), ``ffn``, ``decoder``."""
    encoder, dim = config.encoder, config.encoder.model_dim
    embedding = config.embedding
    num_features = embedding.num_hashes + len(embedding.context_features)
    in_dim = num_features * embedding.dim + len(widths) * embedding.semantic_code_dim
    flops = {"input": 2 * sizes.tokens * in_dim * dim}
    for letter in sorted(set(encoder.layers)):
        flops[letter] = encoder.layers.count(letter) * mixer_flops(letter, encoder, sizes)
    flops["ffn"] = len(encoder.layers) * 2 * sizes.tokens * 3 * dim * encoder.resolved_ffn_dim
    flops["decoder"] = decoder_flops(config, widths, sizes)
    return flops


def mixer_flops(letter: str, encoder: EncoderConfig, sizes: BatchSizes) -> int:
    """Model FLOPs of the forward pass of one mixing layer."""
    tokens, dim = sizes.tokens, encoder.model_dim
    halves = 2 if encoder.direction == "causal" else 1
    if letter == "G":
        head_dim = dim // encoder.num_heads
        columns = (4 if encoder.output_gate else 3) * dim + (encoder.num_heads if encoder.key_gate else 0)
        # the state k v^T, then q S and q n
        return 2 * tokens * dim * (columns + dim) + 2 * tokens * dim * (2 * head_dim + 1)
    pairs = sizes.window_pairs if letter == "W" else sizes.pairs
    # scores q k^T, then their product with v
    return 2 * tokens * dim * 4 * dim + 2 * 2 * pairs * dim // halves


def decoder_flops(config: ModelConfig, widths: tuple[int, ...], sizes: BatchSizes) -> int:
    """Model FLOPs of the decoder's forward pass, its heads and the projection of the memory."""
    dim, levels = config.encoder.model_dim, len(widths)
    ffn_dim = config.decoder.ffn_dim if config.decoder.ffn_dim is not None else 2 * dim
    positions = sizes.targets * levels
    # self-attention's projections (4), cross-attention's query and output (2), feed-forward (3)
    dense = 2 * positions * dim * (6 * dim + 3 * ffn_dim)
    attention = 2 * 2 * dim * (sizes.targets * levels * levels + sizes.memory_pairs)
    return dense + attention + 2 * sizes.tokens * dim * 2 * dim + 2 * sizes.targets * dim * sum(widths)


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
