"""The op in plain PyTorch: one shifted, masked product per tap."""

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

import torch
import torch.nn.functional as F
from torch import Tensor

from gbla_kernels.layout import JaggedLayout


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, layout: JaggedLayout | None, activation: str | None
) -> Tensor:
    """See ``gbla_kernels.causal_conv1d``. Half precision is computed in fp32 and rounded once, at the output."""
    compute = torch.promote_types(x.dtype, torch.float32)
    positions = (layout or JaggedLayout.from_offsets(offsets)).positions
    values, taps = x.to(compute), weight.to(compute)
    num_taps = taps.shape[1]
    y = values * taps[:, num_taps - 1]
    for distance in range(1, min(num_taps, x.shape[0])):
        # a token closer than `distance` to its row's start would read the row before
        past = values[:-distance].masked_fill((positions[distance:] < distance)[:, None], 0)
        y = y + F.pad(past, (0, 0, distance, 0)) * taps[:, num_taps - 1 - distance]
    if bias is not None:
        y = y + bias.to(compute)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
