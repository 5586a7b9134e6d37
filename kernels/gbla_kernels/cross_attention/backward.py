"""The backward kernels: each program owns a part of a row's keys, whose gradients it writes once; shares of dq are added in order."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator"
# L tokens, H heads, K key width, V value width, Z splits, G rows that have keys (docs/shapes.md)

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.cross_attention.forward import (
    _SIZES,
    COMBINED_TILE,
    block_widths,
    first_partial,
    new_output,
    row_products,
    splits_per_part,
)
from gbla_kernels.cross_attention.launch_config import launch_config
from gbla_kernels.cross_attention.row_pairs import BACKWARD_KEYS_PER_QUERY, RowPairs
from gbla_kernels.dispatch import Launcher
from gbla_kernels.elementwise import LOG2E, dot_type


@triton.jit
def load_queries(
    p_query,
    p_d_out,
    p_out,
    p_lse,
    o_m,
    num_queries,
    stride_qt,
    stride_dot,
    stride_ot,
    stride_lt,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """A tile of one head: query and d_out as dot operands, lse, and ``delta = d_out . out``; pointers at the row's first query."""
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_m = o_m < num_queries
    m_mv = m_m[:, None] & (o_v < V)[None, :]
    # int64: a row of queries may be long
    o_t = o_m.to(tl.int64)
    query = tl.load(p_query + o_t[:, None] * stride_qt + o_k[None, :], mask=m_m[:, None] & (o_k < K)[None, :], other=0.0).to(DOT)
    d_out = tl.load(p_d_out + o_t[:, None] * stride_dot + o_v[None, :], mask=m_mv, other=0.0)
    out = tl.load(p_out + o_t[:, None] * stride_ot + o_v[None, :], mask=m_mv, other=0.0).to(tl.float32)
    delta = tl.sum(d_out.to(tl.float32) * out, axis=1)
    # +inf: queries past the row's end weigh no key
    lse = tl.load(p_lse + o_t * stride_lt, mask=m_m, other=float("inf"))
    return query, d_out.to(DOT), lse, delta


@triton.jit
def key_gradients(query, d_out, lse, delta, key, value, m_n, d_key, d_value, scale_log2, DOT: tl.constexpr):
    """Adds a tile's share to dk ``(BN, BK)`` and dv ``(BN, BV)``; also returns ``ds (BM, BN)``. Unscaled."""
    score = row_products(query, key, DOT) * tl.cast(scale_log2, tl.float32)
    # keys past the end have score 0, which a very negative lse would turn into inf
    weight = tl.where(m_n[None, :], tl.exp2(score - lse[:, None]), 0.0)
    d_value = tl.dot(tl.trans(weight.to(DOT)), d_out, acc=d_value, input_precision="tf32x3")
    d_weight = row_products(d_out, value, DOT)
    d_score = (weight * (d_weight - delta[:, None])).to(DOT)
    d_key = tl.dot(tl.trans(d_score), query, acc=d_key, input_precision="tf32x3")
    return d_key, d_value, d_score


@triton.jit(do_not_specialize=[*_SIZES, "min_queries"])
def gradient_kernel(
    query,
    key,
    value,
    out,
    d_out,
    lse,
    d_query,
    d_key,
    d_value,
    partial_d_query,
    query_offsets,
    key_rows,
    splits,
    slot_offsets,
    min_queries,
    max_queries,
    split_stride,
    part_stride,
    token_stride,
    scale,
    scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KEYS_PER_QUERY: tl.constexpr,
    DOT: tl.constexpr,
    IS_TILED: tl.constexpr,
):
    """All gradients of one part of a row's keys and one head, for rows with ``min_queries .. max_queries`` queries; grid ``(Z * H,)``.

    Unless ``IS_TILED``, a row's queries are one tile that stays on the chip, dq with it. Else they are done tile by tile for each
    block of keys, and dq is added up in its partial buffer, which stays in the L2 cache.
    """
    i_program = tl.program_id(0)
    i_head = (i_program % H).to(tl.int64)
    i_split = (i_program // H).to(tl.int64)
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
    if (num_queries < min_queries) | (num_queries > max_queries):
        return
    part_splits = splits_per_part(split_keys, num_queries, KEYS_PER_QUERY)
    if i_split % part_splits != 0:
        return
    num_keys = tl.minimum(part_splits * split_keys, row_keys - i_split * split_keys)
    start = key_start + i_split * split_keys

    o_m = tl.arange(0, BM)
    o_n = tl.arange(0, BN)
    o_k = tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    p_query = query + query_start * stride_qt + i_head * stride_qh
    p_d_out = d_out + query_start * stride_dot + i_head * stride_doh
    p_out = out + (query_start * H + i_head) * V
    p_lse = lse + query_start * H + i_head
    p_key = key + start * stride_kt + i_head * stride_kh + o_n[:, None] * stride_kt + o_k[None, :]
    p_value = value + start * stride_vt + i_head * stride_vh + o_n[:, None] * stride_vt + o_v[None, :]
    p_d_key = d_key + start * stride_dkt + i_head * stride_dkh + o_n[:, None] * stride_dkt + o_k[None, :]
    p_d_value = d_value + start * stride_dvt + i_head * stride_dvh + o_n[:, None] * stride_dvt + o_v[None, :]
    first_row = first_partial(first_split, i_split // part_splits, query_start, split_stride, part_stride, token_stride)
    p_partial = partial_d_query + (first_row * H + i_head) * K
    if IS_TILED:
        for first in range(0, num_keys, BN):
            m_n = first + o_n < num_keys
            b_key = tl.load(p_key, mask=m_n[:, None] & m_k[None, :], other=0.0).to(DOT)
            b_value = tl.load(p_value, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)
            b_d_key = tl.zeros([BN, BK], tl.float32)
            b_d_value = tl.zeros([BN, BV], tl.float32)
            for first_query in range(0, num_queries, BM):
                o_q = first_query + o_m
                b_query, b_d_out, b_lse, b_delta = load_queries(
                    p_query, p_d_out, p_out, p_lse, o_q, num_queries, stride_qt, stride_dot, H * V, H, K, V, BK, BV, DOT
                )
                b_d_key, b_d_value, d_score = key_gradients(
                    b_query, b_d_out, b_lse, b_delta, b_key, b_value, m_n, b_d_key, b_d_value, scale_log2, DOT
                )
                b_d_query = tl.dot(d_score, b_key, input_precision="tf32x3") * tl.cast(scale, tl.float32)
                p_d_query = p_partial + o_q[:, None].to(tl.int64) * (H * K) + o_k[None, :]
                m_mk = (o_q < num_queries)[:, None] & m_k[None, :]
                # the first block of keys finds nothing there
                b_d_query += tl.load(p_d_query, mask=m_mk & (first > 0), other=0.0)
                tl.store(p_d_query, b_d_query, mask=m_mk)
            # the next block reads what this one wrote
            tl.debug_barrier()
            tl.store(p_d_key, (b_d_key * tl.cast(scale, tl.float32)).to(d_key.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
            tl.store(p_d_value, b_d_value.to(d_value.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])
            p_key += BN * stride_kt
            p_value += BN * stride_vt
            p_d_key += BN * stride_dkt
            p_d_value += BN * stride_dvt
    else:
        b_query, b_d_out, b_lse, b_delta = load_queries(
            p_query, p_d_out, p_out, p_lse, o_m, num_queries, stride_qt, stride_dot, H * V, H, K, V, BK, BV, DOT
        )
        b_d_query = tl.zeros([BM, BK], tl.float32)
        for first in range(0, num_keys, BN):
            m_n = first + o_n < num_keys
            b_key = tl.load(p_key, mask=m_n[:, None] & m_k[None, :], other=0.0).to(DOT)
            b_value = tl.load(p_value, mask=m_n[:, None] & m_v[None, :], other=0.0).to(DOT)
            b_d_key = tl.zeros([BN, BK], tl.float32)
            b_d_value = tl.zeros([BN, BV], tl.float32)
            b_d_key, b_d_value, d_score = key_gradients(
                b_query, b_d_out, b_lse, b_delta, b_key, b_value, m_n, b_d_key, b_d_value, scale_log2, DOT
            )
            b_d_query = tl.dot(d_score, b_key, acc=b_d_query, input_precision="tf32x3")
            tl.store(p_d_key, (b_d_key * tl.cast(scale, tl.float32)).to(d_key.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
            tl.store(p_d_value, b_d_value.to(d_value.dtype.element_ty), mask=m_n[:, None] & m_v[None, :])
            p_key += BN * stride_kt
            p_value += BN * stride_vt
            p_d_key += BN * stride_dkt
            p_d_value += BN * stride_dvt
        m_mk = (o_m < num_queries)[:, None] & m_k[None, :]
        o_mk = o_m[:, None] * (H * K) + o_k[None, :]
        b_d_query = b_d_query * tl.cast(scale, tl.float32)
        if num_splits <= part_splits:
            tl.store(d_query + (query_start * H + i_head) * K + o_mk, b_d_query.to(d_query.dtype.element_ty), mask=m_mk)
        else:
            tl.store(p_partial + o_mk, b_d_query, mask=m_mk)


@triton.jit(do_not_specialize=_SIZES)
def combine_gradients_kernel(
    partial_d_query,
    d_query,
    query_offsets,
    key_rows,
    splits,
    slot_offsets,
    num_tiles,
    split_stride,
    part_stride,
    token_stride,
    tiled_above,
    H,
    K: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    KEYS_PER_QUERY: tl.constexpr,
):
    """Sum dq of a tile of queries and one head over the parts of their row, in order; grid ``(G * H * num_tiles,)``."""
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
    if (num_splits <= part_splits) & (num_queries <= tiled_above):
        return
    num_parts = (num_splits + part_splits - 1) // part_splits
    o_t = first_query + tl.arange(0, BT)
    o_k = tl.arange(0, BK)
    m_tk = (o_t < num_queries)[:, None] & (o_k < K)[None, :]
    b_d_query = tl.zeros([BT, BK], tl.float32)
    for i_part in range(0, num_parts):
        first_row = first_partial(first_split, i_part, query_start, split_stride, part_stride, token_stride)
        o_partial = (first_row + o_t) * H + i_head
        b_d_query += tl.load(partial_d_query + o_partial[:, None] * K + o_k[None, :], mask=m_tk, other=0.0)
    p_d_query = d_query + ((query_start + o_t) * H + i_head)[:, None] * K + o_k[None, :]
    tl.store(p_d_query, b_d_query.to(d_query.dtype.element_ty), mask=m_tk)


def run_backward(
    run: Launcher,
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rows: RowPairs,
    scale: float,
    d_key: Tensor,
    d_value: Tensor,
) -> Tensor:
    """Writes the gradients of key and value into ``d_key`` and ``d_value``, which may be views; returns that of query."""
    num_queries, num_heads, key_dim = query.shape
    key_dim, value_dim = int(key_dim), int(value.shape[2])
    config = launch_config(key_dim, value_dim, query.dtype)
    widths = block_widths(key_dim, value_dim)
    if d_out.stride(2) != 1:
        d_out = d_out.contiguous()
    d_query = new_output(query, (num_queries, num_heads, key_dim), rows, query.dtype)
    num_partials = rows.num_partials(num_queries) if rows.has_gradient_parts else 0
    strides = rows.partial_strides(num_queries)
    partial = torch.empty((num_partials, num_heads, key_dim), dtype=torch.float32, device=query.device)
    # launch parameters, the queries of the rows they are for, whether these are more than a tile
    launches = [(config.few, 0, config.few.query_tile, False)]
    if rows.has_many_queries:
        launches.append((config.many, config.few.query_tile + 1, config.tiled_above, False))
    if rows.has_tiled_rows:
        launches.append((config.tiled, config.tiled_above + 1, 2**31 - 1, True))
    for kernel, min_queries, max_queries, is_tiled in launches:
        run(gradient_kernel, (rows.splits.shape[0] * num_heads,))(
            *(query, key, value, out, d_out, lse, d_query, d_key, d_value, partial),
            *(rows.query_offsets, rows.key_rows, rows.splits, rows.slot_offsets),
            *(min_queries, max_queries, *strides, scale, scale * LOG2E.value),
            *(query.stride(0), query.stride(1), key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(d_out.stride(0), d_out.stride(1), d_key.stride(0), d_key.stride(1), d_value.stride(0), d_value.stride(1), num_heads),
            K=key_dim,
            V=value_dim,
            BM=kernel.query_tile,
            BN=kernel.key_block,
            **widths,
            KEYS_PER_QUERY=BACKWARD_KEYS_PER_QUERY,
            DOT=dot_type(query.dtype),
            IS_TILED=is_tiled,
            num_warps=kernel.num_warps,
            num_stages=kernel.num_stages,
        )
    if rows.has_gradient_parts:
        num_tiles = (rows.max_queries + COMBINED_TILE - 1) // COMBINED_TILE
        run(combine_gradients_kernel, ((rows.slot_offsets.shape[0] - 1) * num_heads * num_tiles,))(
            *(partial, d_query, rows.query_offsets, rows.key_rows, rows.splits, rows.slot_offsets),
            *(num_tiles, *strides, config.tiled_above, num_heads),
            K=key_dim,
            BT=COMBINED_TILE,
            BK=widths["BK"],
            KEYS_PER_QUERY=BACKWARD_KEYS_PER_QUERY,
            num_warps=4,
        )
    return d_query
