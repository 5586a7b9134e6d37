"""The backward: the kernels of ``causal_conv1d`` on tiles of whole tokens, which go on through the norm."""

# L tokens, D model width, R conv taps (docs/shapes.md)

from torch import Tensor

from gbla_kernels.causal_conv1d.backward import BACKWARD_ELEMENTS, launch_backward
from gbla_kernels.causal_conv1d.forward import Tile
from gbla_kernels.dispatch import Launcher

BACKWARD_PROGRAMS = 512
"""Programs of four warps that an H100 or H200 holds at once, from the registers of the kernel; also bounds the partial sums."""


def rms_norm_causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    rstd: Tensor,
    has_silu: bool,
    launcher: Launcher,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, norm_weight, weight and bias, each in its dtype; that of a missing bias is empty."""
    tile = Tile.of_whole_tokens(x.shape[1], BACKWARD_ELEMENTS)
    max_programs = BACKWARD_PROGRAMS * 4 // tile.num_warps
    return launch_backward(dy, x, norm_weight, weight, bias, positions, rstd, has_silu, tile, max_programs, launcher)
