"""Softmax attention row by row, for devices and dtypes without a fused jagged kernel; and the same as a registered op.

Compilers see the op as one call: tracing the loop would unroll the rows into a graph for each batch.
"""

# B rows, L tokens, T tokens of a row, H heads, K head width (docs/shapes.md)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MIN_QUERY_BLOCK = 64
"""Queries of one masked call of windowed attention, at least."""


def attend_rows(
    query: Tensor, key: Tensor, value: Tensor, query_lengths: list[int], key_lengths: list[int], is_causal: bool, window: int | None
) -> Tensor:
    """One exact call per row, or per block of queries where there is a window (memory linear in ``T * window``).

    Arguments and result are those of ``jagged_attention``, with the row lengths ``(B,)`` of its layouts.
    """
    if not any(queries and keys for queries, keys in zip(query_lengths, key_lengths, strict=True)):
        # every operand stays in the graph, so gradients are zero and not None
        return query * 0 + (key.sum() + value.sum()) * 0
    outputs = []
    row_keys, row_values = key.split(key_lengths), value.split(key_lengths)
    for q, k, v in zip(query.split(query_lengths), row_keys, row_values, strict=True):
        if q.shape[0] == 0 or k.shape[0] == 0:
            outputs.append(torch.zeros_like(q))
        elif window is None:
            outputs.append(_attend(q, k, v, is_causal=is_causal))
        else:
            outputs += _attend_near(q, k, v, is_causal, window)
    return torch.cat(outputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, mask: Tensor | None = None) -> Tensor:
    """Dense attention of one row, or of a part of it."""
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal)[0].transpose(0, 1)


def _attend_near(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, window: int) -> list[Tensor]:
    """Windowed attention of one row, in blocks of queries that see only the keys they may need."""
    length, block = query.shape[0], max(window, MIN_QUERY_BLOCK)
    positions = torch.arange(length, device=query.device)
    outputs = []
    for start in range(0, length, block):
        queries = slice(start, start + block)
        keys = slice(max(start - window, 0), start + block + (0 if is_causal else window))
        distance = positions[queries, None] - positions[None, keys]
        mask = (distance <= window) & (distance >= (0 if is_causal else -window))
        outputs.append(_attend(query[queries], key[keys], value[keys], mask=mask))
    return outputs


@torch.library.custom_op("gbla_rec::row_attention", mutates_args=())
def row_attention_op(
    query: Tensor, key: Tensor, value: Tensor, query_offsets: Tensor, key_offsets: Tensor, is_causal: bool, window: int | None
) -> Tensor:
    """``attend_rows`` with the offsets ``(B + 1,)`` int64 on the CPU."""
    lengths = (query_offsets.diff().tolist(), key_offsets.diff().tolist())
    return attend_rows(query, key, value, *lengths, is_causal, window)


@torch.library.custom_op("gbla_rec::row_attention_backward", mutates_args=())
def row_attention_backward_op(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_offsets: Tensor,
    key_offsets: Tensor,
    is_causal: bool,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    lengths = (query_offsets.diff().tolist(), key_offsets.diff().tolist())
    # vjp records its own graph: autograd is off inside an op
    pull_back = torch.func.vjp(lambda q, k, v: attend_rows(q, k, v, *lengths, is_causal, window), query, key, value)[1]
    d_query, d_key, d_value = (gradient.contiguous() for gradient in pull_back(d_output))
    return d_query, d_key, d_value


@row_attention_op.register_fake
def _(query: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape)


@row_attention_backward_op.register_fake
def _(d_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.settings = inputs[5:]


def _registered_backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
    return (*row_attention_backward_op(d_output, *ctx.saved_tensors, *ctx.settings), *(None,) * 4)


row_attention_op.register_autograd(_registered_backward, setup_context=_save_inputs)
