"""The forward: the kernel of ``causal_conv1d`` on tiles of whole tokens, which it normalises as it loads them."""

# L tokens, D model width, R conv taps (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.causal_conv1d.forward import FORWARD_ELEMENTS, Tile, launch_forward
from gbla_kernels.dispatch import Launcher

MAX_DIM = 2048
"""A program holds whole tokens in registers."""
FORWARD_PROGRAMS = 384
"""Programs of four warps that an H100 or H200 holds at once, from the registers of the kernel."""


def rms_norm_causal_conv1d_forward(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    eps: float,
    has_silu: bool,
    launcher: Launcher,
) -> tuple[Tensor, Tensor]:
    """``(L, D)`` in the dtype of x, and the reciprocal norms ``(L,)`` fp32 that the backward reads."""
    rstd = torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)
    tile = Tile.of_whole_tokens(x.shape[1], FORWARD_ELEMENTS)
    max_programs = FORWARD_PROGRAMS * 4 // tile.num_warps
    y = launch_forward(x, norm_weight, weight, bias, positions, rstd, eps, has_silu, tile, max_programs, launcher)
    return y, rstd
