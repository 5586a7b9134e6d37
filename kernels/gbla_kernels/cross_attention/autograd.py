"""Joins the kernels to autograd: directly in eager mode, as registered ops under a compiler."""

# L tokens, H heads, K key width, V value width, Z splits (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor

from gbla_kernels.cross_attention.backward import run_backward
from gbla_kernels.cross_attention.forward import run_forward
from gbla_kernels.cross_attention.row_pairs import RowPairs
from gbla_kernels.dispatch import INTERPRETED, Launcher, launch, operator, traced_launch


class _Attend(torch.autograd.Function):
    """The op in eager mode."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: RowPairs, scale: float) -> Tensor:
        out, lse = run_forward(launch, query, key, value, rows, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        return *_gradients(launch, d_out, query, key, value, out, lse, ctx.rows, ctx.scale), None, None


class _AttendPacked(torch.autograd.Function):
    """The op on one projection of keys and values, in eager mode: its gradient is written in place of two that would be joined."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key_value: Tensor, rows: RowPairs, scale: float) -> Tensor:
        key, value = key_value.unbind(1)
        out, lse = run_forward(launch, query, key, value, rows, scale)
        ctx.save_for_backward(query, key_value, out, lse)
        ctx.rows, ctx.scale = rows, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, out, lse = ctx.saved_tensors
        d_key_value = torch.empty(key_value.shape, dtype=key_value.dtype, device=key_value.device)
        (key, value), (d_key, d_value) = key_value.unbind(1), d_key_value.unbind(1)
        d_query = run_backward(launch, d_out, query, key, value, out, lse, ctx.rows, ctx.scale, d_key, d_value)
        return d_query, d_key_value, None, None


def _gradients(
    run: Launcher,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: RowPairs,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    d_key = torch.empty(key.shape, dtype=key.dtype, device=key.device)
    d_value = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    return run_backward(run, d_out, query, key, value, out, lse, rows, scale, d_key, d_value), d_key, d_value


def attend(query: Tensor, key: Tensor, value: Tensor, rows: RowPairs, scale: float, *, is_traced: bool) -> Tensor:
    """The op on Triton; every tensor has a dense last dimension."""
    if is_traced:
        out: Tensor = jagged_cross_attention_op(query, key, value, *rows, scale)[0]
        return out
    out = _Attend.apply(query, key, value, rows, scale)  # type: ignore[no-untyped-call]
    return out


def attend_packed(query: Tensor, key_value: Tensor, rows: RowPairs, scale: float) -> Tensor:
    """The same in eager mode, on keys and values ``(L_key, 2, H, K)``."""
    out: Tensor = _AttendPacked.apply(query, key_value, rows, scale)  # type: ignore[no-untyped-call]
    return out


@operator("jagged_cross_attention")
def jagged_cross_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    max_queries: int,
    parts_per_query: int,
    has_parts: bool,
    has_gradient_parts: bool,
    has_many_queries: bool,
    has_tiled_rows: bool,
    has_empty_rows: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Output, and the logarithms of the softmax denominators for backward. The arguments are those of ``RowPairs``."""
    rows = RowPairs(
        *(query_offsets, key_rows, splits, slot_offsets, max_queries, parts_per_query),
        *(has_parts, has_gradient_parts, has_many_queries, has_tiled_rows, has_empty_rows),
    )
    return run_forward(traced_launch, query, key, value, rows, scale)


@operator("jagged_cross_attention_backward")
def jagged_cross_attention_backward_op(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    key_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    max_queries: int,
    parts_per_query: int,
    has_parts: bool,
    has_gradient_parts: bool,
    has_many_queries: bool,
    has_tiled_rows: bool,
    has_empty_rows: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    rows = RowPairs(
        *(query_offsets, key_rows, splits, slot_offsets, max_queries, parts_per_query),
        *(has_parts, has_gradient_parts, has_many_queries, has_tiled_rows, has_empty_rows),
    )
    return _gradients(traced_launch, d_out, query, key, value, out, lse, rows, scale)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, d_out: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (4 + len(ctx.options))
    if d_out is None:
        return (None, None, None, *nothing)
    return (*jagged_cross_attention_backward_op(d_out, *ctx.saved_tensors, *ctx.options), *nothing)


jagged_cross_attention_op.register_autograd(_op_backward, setup_context=_setup)


if INTERPRETED:

    @jagged_cross_attention_op.register_fake  # type: ignore[untyped-decorator]
    def _(query: Tensor, key: Tensor, value: Tensor, *rows: Any) -> tuple[Tensor, Tensor]:
        num_queries, num_heads, _ = query.shape
        lse = query.new_empty((num_queries, num_heads), dtype=torch.float32)
        return query.new_empty((num_queries, num_heads, value.shape[2])), lse

    @jagged_cross_attention_backward_op.register_fake  # type: ignore[untyped-decorator]
    def _(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)
