"""The forward kernels: attention of a tile of queries over a part of its row's keys, and the sum over parts.

Each kernel reads the tables of its row itself: torch takes tensors that a device function reads to be written where the kernel
stores at a place that the function returned.
"""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# L tokens, H heads, K key width, V value width, Z splits, G rows that have keys (docs/shapes.md)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.cross_attention.launch_config import launch_config
from gbla_kernels.cross_attention.row_pairs import KEYS_PER_QUERY, MIN_PART, RowPairs
from gbla_kernels.dispatch import Launcher
from gbla_kernels.elementwise import LOG2E, dot_type
from gbla_kernels.row_splits import MAX_SPLITS

COMBINED_TILE = 16
"""Queries of a program that adds up parts."""
SUMMED_COLUMNS = 64
"""Columns of fp32 whose products a tensor core may add up: it cuts its sum off where fp32 would round."""

_SUMMED_COLUMNS = tl.constexpr(SUMMED_COLUMNS)
_MAX_SPLITS = tl.constexpr(triton.next_power_of_2(MAX_SPLITS))
_MIN_PART = tl.constexpr(MIN_PART)

_SIZES = ["max_queries", "num_tiles", "split_stride", "part_stride", "token_stride"]
"""Arguments that change from batch to batch: no kernel is compiled for a value of them."""


@triton.jit
def splits_per_part(split_keys, num_queries, KEYS_PER_QUERY: tl.constexpr):
    """Neighbouring splits that one program takes: more where there are more queries."""
    return (tl.maximum(num_queries * KEYS_PER_QUERY, _MIN_PART) + split_keys - 1) // split_keys


@triton.jit
def first_partial(first_split, i_part, query_start, split_stride, part_stride, token_stride):
    """Where the partial results of a part begin, one row for each query; int64."""
    return (first_split + i_part) * split_stride + i_part * part_stride + query_start * token_stride


@triton.jit
def row_products(a, b, DOT: tl.constexpr):
    """``a b^T`` for ``a (M, K)`` and ``b (N, K)``; fp32 sums over many columns are made of shorter ones."""
    if DOT == tl.float32 and a.shape[1] > _SUMMED_COLUMNS:
        # even and odd columns: neighbours lie in one thread
        even_a, odd_a = tl.split(tl.reshape(a, [a.shape[0], a.shape[1] // 2, 2]))
        even_b, odd_b = tl.split(tl.reshape(b, [b.shape[0], b.shape[1] // 2, 2]))
        return row_products(even_a, even_b, DOT) + row_products(odd_a, odd_b, DOT)
    else:
        return tl.dot(a, tl.trans(b), input_precision="tf32x3")


@triton.jit(do_not_specialize=_SIZES)
def attention_kernel(
    query,
    key,
    value,
    out,
    lse,
    partial_out,
    partial_stats,
    query_offsets,
    key_rows,
    splits,
    slot_offsets,
    num_tiles,
    split_stride,
    part_stride,
    token_stride,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS_PER_QUERY: tl.constexpr,
    DOT: tl.constexpr,
):
    """One tile of queries, one head, one part of their row's keys; grid ``(Z * H * num_tiles,)``.

    A row's first split, and every ``splits_per_part``-th after it, begins a part; programs of other splits have nothing to do.
    """
    i_program = tl.program_id(0)
    first_query = i_program % num_tiles * BM
    i_head = (i_program // num_tiles % H).to(tl.int64)
    i_split = (i_program // num_tiles // H).to(tl.int64)
    i_slot = tl.load(splits + 3 * i_split)
    first_split = tl.load(slot_offsets + i_slot)
    num_splits = (tl.load(slot_offsets + i_slot + 1) - first_split).to(tl.int32)
    i_split = (i_split - first_split).to(tl.int32)
    if i_split >= num_splits:
        # more splits than the row has: an unused entry of the table
        return
    key_start = tl.load(splits + 3 * first_split + 1)
    split_keys = (tl.load(splits + 3 * first_split + 2) - key_start).to(tl.int32)
    row_keys = (tl.load(splits + 3 * (first_split + num_splits) - 1) - key_start).to(tl.int32)
    i_row = tl.load(key_rows + key_start)
    query_start = tl.load(query_offsets + i_row)
    num_queries = (tl.load(query_offsets + i_row + 1) - query_start).to(tl.int32)
    if first_query >= num_queries:
        return
    part_splits = splits_per_part(split_keys, num_queries, KEYS_PER_QUERY)
    if i_split % part_splits != 0:
        return
    num_keys = tl.minimum(part_splits * split_keys, row_keys - i_split * split_keys)
    start = key_start + i_split * split_keys

    o_m = first_query + tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_m = o_m < num_queries
    m_k = o_k < K
    m_v = o_v < V
    p_query = query + query_start * stride_qt + i_head * stride_qh + o_m[:, None].to(tl.int64) * stride_qt + o_k[None, :]
    b_query = tl.load(p_query, mask=m_m[:, None] & m_k[None, :], other=0.0).to(DOT)
    p_key = key + start * stride_kt + i_head * stride_kh + o_n[:, None] * stride_kt + o_k[None, :]
    p_value = value + start * stride_vt + i_head * stride_vh + o_n[:, None] * stride_vt + o_v[None, :]
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    b_out = tl.zeros([BM, BV], tl.float32)
    for first in range(0, num_keys, BN):
        m_n = first + o_n < num_keys
        b_key = tl.load(p_key, mask=m_n[:, None] & m_k[None, :], other=0.0).to(DOT)
        b_value = tl.load(p_value, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)
        score = row_products(b_query, b_key, DOT) * tl.cast(scale_log2, tl.float32)
        score = tl.where(m_n[None, :], score, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(score, axis=1))
        weight = tl.exp2(score - new_largest[:, None])
        rescale = tl.exp2(largest - new_largest)
        total = total * rescale + tl.sum(weight, axis=1)
        b_out = tl.dot(weight.to(DOT), b_value, acc=b_out * rescale[:, None], input_precision="tf32x3")
        largest = new_largest
        p_key += BN * stride_kt
        p_value += BN * stride_vt

    m_mv = m_m[:, None] & m_v[None, :]
    if num_splits <= part_splits:
        o_token = (query_start + o_m) * H + i_head
        tl.store(out + o_token[:, None] * V + o_v[None, :], (b_out / total[:, None]).to(out.dtype.element_ty), mask=m_mv)
        tl.store(lse + o_token, largest + tl.log2(total), mask=m_m)
    else:
        first_row = first_partial(first_split, i_split // part_splits, query_start, split_stride, part_stride, token_stride)
        o_partial = (first_row + o_m) * H + i_head
        tl.store(partial_out + o_partial[:, None] * V + o_v[None, :], b_out, mask=m_mv)
        tl.store(partial_stats + 2 * o_partial, largest, mask=m_m)
        tl.store(partial_stats + 2 * o_partial + 1, total, mask=m_m)


@triton.jit(do_not_specialize=_SIZES)
def combine_outputs_kernel(
    partial_out,
    partial_stats,
    out,
    lse,
    query_offsets,
    key_rows,
    splits,
    slot_offsets,
    num_tiles,
    split_stride,
    part_stride,
    token_stride,
    H,
    V: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    KEYS_PER_QUERY: tl.constexpr,
):
    """Outputs of a tile of queries and one head from the parts of their row, added in order; grid ``(G * H * num_tiles,)``."""
    i_program = tl.program_id(0)
    first_query = i_program % num_tiles * BT
    i_head = (i_program // num_tiles % H).to(tl.int64)
    i_slot = i_program // num_tiles // H
    first_split = tl.load(slot_offsets + i_slot)
    num_splits = (tl.load(slot_offsets + i_slot + 1) - first_split).to(tl.int32)
    if num_splits == 0:
        return
    key_start = tl.load(splits + 3 * first_split + 1)
    split_keys = (tl.load(splits + 3 * first_split + 2) - key_start).to(tl.int32)
    i_row = tl.load(key_rows + key_start)
    query_start = tl.load(query_offsets + i_row)
    num_queries = (tl.load(query_offsets + i_row + 1) - query_start).to(tl.int32)
    if first_query >= num_queries:
        return
    part_splits = splits_per_part(split_keys, num_queries, KEYS_PER_QUERY)
    if num_splits <= part_splits:
        return
    num_parts = (num_splits + part_splits - 1) // part_splits
    o_t = first_query + tl.arange(0, BT)
    m_t = o_t < num_queries
    # one load of all parts' statistics, since they are few
    o_p = tl.arange(0, _MAX_SPLITS)
    m_tp = m_t[:, None] & (o_p < num_parts)[None, :]
    first_rows = first_partial(first_split, o_p, query_start, split_stride, part_stride, token_stride)
    o_stats = 2 * ((first_rows[None, :] + o_t[:, None]) * H + i_head)
    maxima = tl.load(partial_stats + o_stats, mask=m_tp, other=float("-inf"))
    # 0 past the row's end: no NaN from -inf minus -inf
    largest = tl.where(m_t, tl.max(maxima, axis=1), 0.0)
    totals = tl.load(partial_stats + o_stats + 1, mask=m_tp, other=0.0)
    total = tl.where(m_t, tl.sum(totals * tl.exp2(maxima - largest[:, None]), axis=1), 1.0)
    o_v = tl.arange(0, BV)
    m_tv = m_t[:, None] & (o_v < V)[None, :]
    b_out = tl.zeros([BT, BV], tl.float32)
    for i_part in range(0, num_parts):
        first_row = first_partial(first_split, i_part, query_start, split_stride, part_stride, token_stride)
        o_partial = (first_row + o_t) * H + i_head
        rescale = tl.exp2(tl.load(partial_stats + 2 * o_partial, mask=m_t, other=float("-inf")) - largest)
        b_out += rescale[:, None] * tl.load(partial_out + o_partial[:, None] * V + o_v[None, :], mask=m_tv, other=0.0)
    o_token = (query_start + o_t) * H + i_head
    b_out = b_out / total[:, None]
    tl.store(out + o_token[:, None] * V + o_v[None, :], b_out.to(out.dtype.element_ty), mask=m_tv)
    tl.store(lse + o_token, largest + tl.log2(total), mask=m_t)


def block_widths(key_dim: int, value_dim: int) -> dict[str, int]:
    """``K`` and ``V`` rounded up to what a dot takes."""
    return {"BK": max(triton.next_power_of_2(key_dim), 16), "BV": max(triton.next_power_of_2(value_dim), 16)}


def new_output(like: Tensor, shape: tuple[Any, ...], rows: RowPairs, dtype: torch.dtype) -> Tensor:
    """Memory for a result per query: zeros where no kernel may write."""
    make = torch.zeros if rows.has_empty_rows else torch.empty
    return make(shape, dtype=dtype, device=like.device)


def run_forward(run: Launcher, query: Tensor, key: Tensor, value: Tensor, rows: RowPairs, scale: float) -> tuple[Tensor, Tensor]:
    """Output ``(L_query, H, V)`` and the base-2 logarithm ``(L_query, H)`` fp32 of each softmax denominator, both contiguous."""
    num_queries, num_heads, key_dim = query.shape
    # widths are compiled in
    key_dim, value_dim = int(key_dim), int(value.shape[2])
    config = launch_config(key_dim, value_dim, query.dtype).attention
    widths = block_widths(key_dim, value_dim)
    out = new_output(query, (num_queries, num_heads, value_dim), rows, value.dtype)
    lse = new_output(query, (num_queries, num_heads), rows, torch.float32)
    num_partials = rows.num_partials(num_queries) if rows.has_parts else 0
    strides = rows.partial_strides(num_queries)
    partial_out = torch.empty((num_partials, num_heads, value_dim), dtype=torch.float32, device=query.device)
    partial_stats = torch.empty((num_partials, num_heads, 2), dtype=torch.float32, device=query.device)
    num_tiles = (rows.max_queries + config.query_tile - 1) // config.query_tile
    run(attention_kernel, (rows.splits.shape[0] * num_heads * num_tiles,))(
        *(query, key, value, out, lse, partial_out, partial_stats),
        *(rows.query_offsets, rows.key_rows, rows.splits, rows.slot_offsets),
        *(num_tiles, *strides, scale * LOG2E.value),
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1), num_heads),
        K=key_dim,
        V=value_dim,
        BM=config.query_tile,
        BN=config.key_block,
        **widths,
        KEYS_PER_QUERY=KEYS_PER_QUERY,
        DOT=dot_type(query.dtype),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if rows.has_parts:
        num_tiles = (rows.max_queries + COMBINED_TILE - 1) // COMBINED_TILE
        run(combine_outputs_kernel, ((rows.slot_offsets.shape[0] - 1) * num_heads * num_tiles,))(
            *(partial_out, partial_stats, out, lse, rows.query_offsets, rows.key_rows, rows.splits, rows.slot_offsets),
            *(num_tiles, *strides, num_heads),
            V=value_dim,
            BT=COMBINED_TILE,
            BV=widths["BV"],
            KEYS_PER_QUERY=KEYS_PER_QUERY,
            num_warps=4,
        )
    return out, lse
