"""Model FLOPs of a training step, from the config and the lengths of a batch, and the peak of a GPU that MFU compares them to.

A multiply-add counts two. Backward of a product costs two products of its size, so a step counts three forward passes
(Chowdhery et al., arXiv 2204.02311); what activation checkpointing computes twice is left out.
"""

# T tokens of a row, S targets, C code levels (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels import JaggedLayout
from gbla_rec.config import BatchSizes, ModelConfig, forward_multiply_adds

PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s by a part of the device's name (NVIDIA's data sheets, without sparsity; SXM)."""
PASSES = 3
"""Forward, and backward at twice its cost."""


def batch_sizes(
    layout: JaggedLayout,
    code_layout: JaggedLayout,
    num_targets: int,
    window: int,
    *,
    num_queries: int = 0,
    num_candidates: int = 0,
    num_scores: int = 0,
) -> BatchSizes:
    """Sizes of a batch from its histories, its code positions and its targets; read on the host.

    Args:
        layout: rows of history tokens.
        code_layout: rows of code positions, ``C`` for each target.
        num_targets: ``S``.
        window: tokens that a windowed layer sees on each side.
        num_queries: of the item-level head.
        num_candidates: items that the head gives vectors.
        num_scores: products of a query and a candidate.
    """
    lengths, codes = layout.offsets_cpu.diff(), code_layout.offsets_cpu.diff()
    return BatchSizes(
        tokens=layout.num_tokens,
        pairs=int(lengths.square().sum()),
        window_pairs=_window_pairs(lengths, window),
        targets=num_targets,
        memory_pairs=int((lengths * codes).sum()),
        queries=num_queries,
        candidates=num_candidates,
        scores=num_scores,
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
    return PASSES * 2 * sum(forward_multiply_adds(config, widths, sizes).values())


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
