"""Gradients: an autograd Function for eager calls, and registered ops for torch.compile, torch.export and AOTInductor."""

# L tokens, D model width, R conv taps (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gbla_kernels.causal_conv1d.backward import causal_conv1d_backward
from gbla_kernels.causal_conv1d.forward import causal_conv1d_forward
from gbla_kernels.dispatch import INTERPRETED, is_traced, launch, operator, traced_launch


def causal_conv1d_triton(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool) -> Tensor:
    """``(L, D)`` for ``x (L, D)`` with adjacent channels; ``positions (L,)`` int64 are those of the tokens in their rows."""
    if is_traced(x, weight, bias):
        return causal_conv1d_op(x, weight, bias, positions, has_silu)  # type: ignore[no-any-return]
    return _CausalConv1d.apply(x, weight, bias, positions, has_silu)  # type: ignore[no-any-return, no-untyped-call]


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool) -> Tensor:
        ctx.save_for_backward(x, weight, bias, positions)
        ctx.has_silu = has_silu
        return causal_conv1d_forward(x, weight, bias, positions, has_silu, launch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, positions = ctx.saved_tensors
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        dx, d_weight, d_bias = causal_conv1d_backward(dy, x, weight, bias, positions, ctx.has_silu, launch)
        return dx, d_weight, None if bias is None else d_bias, None, None


@operator("causal_conv1d")
def causal_conv1d_op(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool) -> Tensor:
    """See ``causal_conv1d_triton``."""
    return causal_conv1d_forward(x, weight, bias, positions, has_silu, traced_launch)


@operator("causal_conv1d_backward")
def causal_conv1d_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; that of a missing bias is empty."""
    return causal_conv1d_backward(dy, x, weight, bias, positions, has_silu, traced_launch)


if INTERPRETED:

    @causal_conv1d_op.register_fake  # type: ignore[untyped-decorator]
    def _(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool) -> Tensor:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    @causal_conv1d_backward_op.register_fake  # type: ignore[untyped-decorator]
    def _(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool) -> tuple[Tensor, Tensor, Tensor]:
        d_bias = weight.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
        return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(weight.shape, dtype=weight.dtype, device=x.device), d_bias


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.has_silu = inputs
    ctx.save_for_backward(*tensors)


def _registered_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, positions = ctx.saved_tensors
    dx, d_weight, d_bias = causal_conv1d_backward_op(dy.contiguous(), x, weight, bias, positions, ctx.has_silu)
    return dx, d_weight, None if bias is None else d_bias, None, None


causal_conv1d_op.register_autograd(_registered_backward, setup_context=_save_inputs)
