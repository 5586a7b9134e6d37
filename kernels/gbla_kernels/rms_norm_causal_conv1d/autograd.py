"""Gradients: an autograd Function for eager calls, and registered ops for torch.compile, torch.export and AOTInductor."""

# L tokens, D model width, R conv taps (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gbla_kernels.dispatch import INTERPRETED, is_traced, launch, operator, traced_launch
from gbla_kernels.rms_norm_causal_conv1d.backward import rms_norm_causal_conv1d_backward
from gbla_kernels.rms_norm_causal_conv1d.forward import rms_norm_causal_conv1d_forward


def rms_norm_causal_conv1d_triton(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, eps: float, has_silu: bool
) -> Tensor:
    """``(L, D)`` for ``x (L, D)`` with adjacent channels; ``positions (L,)`` int64 are those of the tokens in their rows."""
    if is_traced(x, norm_weight, weight, bias):
        return rms_norm_causal_conv1d_op(x, norm_weight, weight, bias, positions, eps, has_silu)[0]  # type: ignore[no-any-return]
    arguments = (x, norm_weight, weight, bias, positions, eps, has_silu)
    return _RmsNormCausalConv1d.apply(*arguments)  # type: ignore[no-any-return, no-untyped-call]


class _RmsNormCausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, eps: float, has_silu: bool
    ) -> Tensor:
        y, rstd = rms_norm_causal_conv1d_forward(x, norm_weight, weight, bias, positions, eps, has_silu, launch)
        ctx.save_for_backward(x, norm_weight, weight, bias, positions, rstd)
        ctx.has_silu = has_silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        dy = dy if dy.stride(1) == 1 else dy.contiguous()
        x, norm_weight, weight, bias, positions, rstd = ctx.saved_tensors
        dx, d_norm, d_weight, d_bias = rms_norm_causal_conv1d_backward(
            dy, x, norm_weight, weight, bias, positions, rstd, ctx.has_silu, launch
        )
        return dx, d_norm, d_weight, None if bias is None else d_bias, None, None, None


@operator("rms_norm_causal_conv1d")
def rms_norm_causal_conv1d_op(
    x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, eps: float, has_silu: bool
) -> tuple[Tensor, Tensor]:
    """The output, and the reciprocal norms ``(L,)`` fp32."""
    return rms_norm_causal_conv1d_forward(x, norm_weight, weight, bias, positions, eps, has_silu, traced_launch)


@operator("rms_norm_causal_conv1d_backward")
def rms_norm_causal_conv1d_backward_op(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    rstd: Tensor,
    has_silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, norm_weight, weight and bias; that of a missing bias is empty."""
    return rms_norm_causal_conv1d_backward(dy, x, norm_weight, weight, bias, positions, rstd, has_silu, traced_launch)


if INTERPRETED:

    def _new(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    @rms_norm_causal_conv1d_op.register_fake  # type: ignore[untyped-decorator]
    def _(
        x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, eps: float, has_silu: bool
    ) -> tuple[Tensor, Tensor]:
        return _new(x), torch.empty((x.shape[0],), dtype=torch.float32, device=x.device)

    @rms_norm_causal_conv1d_backward_op.register_fake  # type: ignore[untyped-decorator]
    def _(
        dy: Tensor,
        x: Tensor,
        norm_weight: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        positions: Tensor,
        rstd: Tensor,
        has_silu: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _new(x), _new(norm_weight), _new(weight), weight.new_empty(0) if bias is None else _new(bias)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _, ctx.has_silu = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _registered_backward(ctx: Any, dy: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, norm_weight, weight, bias, positions, rstd = ctx.saved_tensors
    dx, d_norm, d_weight, d_bias = rms_norm_causal_conv1d_backward_op(
        dy.contiguous(), x, norm_weight, weight, bias, positions, rstd, ctx.has_silu
    )
    return dx, d_norm, d_weight, None if bias is None else d_bias, None, None, None


rms_norm_causal_conv1d_op.register_autograd(_registered_backward, setup_context=_save_inputs)
