"""The op in plain PyTorch: the norm in fp32, not rounded, then the convolution."""

# L tokens, D model width, R conv taps (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.causal_conv1d.reference import causal_conv1d_reference
from gbla_kernels.layout import JaggedLayout


def rms_norm_causal_conv1d_reference(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    layout: JaggedLayout | None,
    activation: str | None,
    eps: float,
) -> Tensor:
    """See ``gbla_kernels.rms_norm_causal_conv1d``. Half precision is computed in fp32 and rounded once, at the output."""
    values = x.to(torch.promote_types(x.dtype, torch.float32))
    normed = values * torch.rsqrt(values.square().mean(1, keepdim=True) + eps) * norm_weight.to(values.dtype)
    return causal_conv1d_reference(normed, weight, bias, offsets, layout, activation).to(x.dtype)
