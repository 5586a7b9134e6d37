"""Gradients, which are the inverse rotation: an autograd Function for eager calls, one registered op for compilers."""

# L tokens, H heads, K head width (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gbla_kernels.dispatch import INTERPRETED, is_traced, launch, operator, traced_launch
from gbla_kernels.rotary.forward import rotary_forward


def rotary_triton(query: Tensor, key: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Query and key ``(L, H, K)``, turned by ``positions (L,)`` int64."""
    query, key = _dense(query), _dense(key)
    if is_traced(query, key):
        return rotary_op(query, key, positions, base, False)  # type: ignore[no-any-return]
    return _Rotary.apply(query, key, positions, base)  # type: ignore[no-any-return, no-untyped-call]


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(positions)
        ctx.base = base
        return rotary_forward(query, key, positions, base, False, launch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        return (*rotary_forward(_dense(d_query), _dense(d_key), positions, ctx.base, True, launch), None, None)


@operator("rotary")
def rotary_op(query: Tensor, key: Tensor, positions: Tensor, base: float, inverse: bool) -> tuple[Tensor, Tensor]:
    """See ``rotary_triton``; ``inverse`` turns the other way."""
    return rotary_forward(query, key, positions, base, inverse, traced_launch)


if INTERPRETED:

    @rotary_op.register_fake  # type: ignore[untyped-decorator]
    def _(query: Tensor, key: Tensor, positions: Tensor, base: float, inverse: bool) -> tuple[Tensor, Tensor]:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device), torch.empty(key.shape, dtype=key.dtype, device=key.device)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, positions, ctx.base, ctx.inverse = inputs
    ctx.save_for_backward(positions)


def _registered_backward(ctx: Any, d_query: Tensor, d_key: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    return (*rotary_op(d_query.contiguous(), d_key.contiguous(), positions, ctx.base, not ctx.inverse), None, None, None)


rotary_op.register_autograd(_registered_backward, setup_context=_save_inputs)
