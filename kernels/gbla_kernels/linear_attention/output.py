"""Outputs of tokens from the combined state of their row."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.elementwise import sigmoid
from gbla_kernels.linear_attention.elementwise import (
    dot_rows,
    feature_map,
    inverse,
    keep_operand,
    product_with_zeros,
    round_like,
    two_columns,
)
from gbla_kernels.linear_attention.state import load_normalized_state, load_state, splits_of_row, store_state, stored_state


@triton.jit
def normalized(u, c, eps, V, NORMALIZE: tl.constexpr, HAS_NORM: tl.constexpr):
    """Factor ``f (BT,)`` with ``RMSNorm(u / c) = u f``, or without norm or division as the flags say; 0 where ``c`` is 0."""
    # a compiled graph passes Python floats as fp64
    eps = tl.cast(eps, tl.float32)
    if HAS_NORM:
        if NORMALIZE:
            is_zero = c == 0
            inverse_c = tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, c))
            o = u * inverse_c[:, None]
            return inverse_c * tl.rsqrt(tl.sum(o * o, axis=1) / V + eps)
        return tl.rsqrt(tl.sum(u * u, axis=1) / V + eps)
    if NORMALIZE:
        is_zero = c == 0
        return tl.where(is_zero, 0.0, 1.0 / tl.where(is_zero, 1.0, c))
    return c * 0 + 1.0


@triton.jit
def emit_output(
    p_query,
    p_output_gate,
    p_norm_weight,
    p_out,
    state,
    normalizer,
    stats,
    i_slot,
    i_head,
    H,
    row_state,
    row_normalizer,
    num_tokens,
    stride_qt,
    stride_zt,
    stride_ot,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    COPIED_AHEAD: tl.constexpr,
):
    """Outputs of ``num_tokens`` tokens of one head. With NK == 1 from ``row_state``; else key slices of the state are read again.

    If ``COPIED_AHEAD``, asynchronous copies bring queries and z, which lie swizzled for it (``keep_operand``).
    """
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    if HAS_NORM:
        norm_weight = tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    rows = dot_rows(BT, BV, DOT) if COPIED_AHEAD else 0.0
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        m_tv = m_t[:, None] & m_v[None, :]
        if HAS_OUTPUT_GATE:
            # loaded early: used last
            z = tl.load(p_output_gate + o_t[:, None] * stride_zt + o_v[None, :], mask=m_tv, other=0.0)
        u = tl.zeros([BT, BV], tl.float32)
        c = tl.zeros([BT, 8], tl.float32)
        products = tl.zeros([BT, 8], tl.float32)
        # a loop, not unrolled: the code of many slices takes a minute to compile
        for j in range(NK):
            if NK == 1:
                slice_state, slice_normalizer = row_state, row_normalizer
            else:
                slice_state, slice_normalizer = load_normalized_state(
                    state, normalizer, stats, i_slot, i_head, H, j * BK, K, V, BK, BV, DOT
                )
            o_k = j * BK + tl.arange(0, BK)
            m_k = o_k < K
            query = tl.load(p_query + o_t[:, None] * stride_qt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
            if COPIED_AHEAD:
                products = product_with_zeros(query, products, DOT)
                # once for both products, which have different layouts
                phi = round_like(feature_map(query.to(tl.float32), RELU), rows, DOT, True)
            else:
                phi = feature_map(query.to(tl.float32), RELU).to(DOT)
            u = tl.dot(phi, slice_state, acc=u, input_precision="tf32x3")
            if NORMALIZE:
                # padded keys have a zero normalizer
                c = tl.dot(phi, two_columns(slice_normalizer, BK, DOT), acc=c, input_precision="tf32x3")
        if COPIED_AHEAD:
            if HAS_OUTPUT_GATE:
                products = product_with_zeros(z, products, DOT)
            c = keep_operand(c, products)
        c_sum = tl.sum(c, axis=1)
        factor = normalized(u, c_sum, eps, V, NORMALIZE, HAS_NORM)
        if COPIED_AHEAD and not NORMALIZE:
            # nothing else uses c then, and the products would be left out
            factor = keep_operand(factor, c_sum)
        y = u * factor[:, None]
        if HAS_NORM:
            y = y * norm_weight[None, :]
        if HAS_OUTPUT_GATE:
            z = z.to(tl.float32)
            y = y * (z * sigmoid(z))
        tl.store(p_out + o_t[:, None] * stride_ot + o_v[None, :], y.to(p_out.dtype.element_ty), mask=m_tv)


@triton.jit(do_not_specialize=["fold", "pieces"])
def output_kernel(
    query,
    output_gate,
    norm_weight,
    out,
    splits,
    slot_offsets,
    partial_state,
    partial_normalizer,
    partial_stats,
    state,
    normalizer,
    stats,
    fold,
    pieces,
    stride_qt,
    stride_qh,
    stride_zt,
    stride_zh,
    stride_ot,
    stride_oh,
    H,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
):
    """Outputs of a piece of one split and head; grid ``(Z * H * pieces,)``. Its own bits do not depend on ``pieces``.

    The partial states of a row of at most ``fold`` splits are combined here, which saves a launch, and the row's first split writes the
    result for backward; else the combined state is read. Both give the same bits.
    """
    i_piece = tl.program_id(0) % pieces
    i_partial = tl.program_id(0) // pieces
    # 32 bits, widened where it addresses: registers decide how many programs fit, and a 64-bit index may cost some
    i_head = i_partial % H
    # loaded here, not in a function: the compiler's analysis of writes loses values that functions return
    p_split = splits + 3 * (i_partial // H)
    i_slot = tl.load(p_split).to(tl.int32)
    start = tl.load(p_split + 1)
    num_tokens = (tl.load(p_split + 2) - start).to(tl.int32)
    size = tl.cdiv(tl.cdiv(num_tokens, pieces), BT) * BT
    start += i_piece * size
    num_tokens = tl.minimum(num_tokens - i_piece * size, size)
    if NK == 1:
        first, count = splits_of_row(slot_offsets, i_slot, fold)
        if count <= fold:
            # a piece past the end of its split has nothing to do
            count = tl.where(num_tokens > 0, count, 0)
            # as many as the registers of a thread hold
            FOLD_UNROLL: tl.constexpr = 3 if BK * BV <= 4096 else 2
            values, normalizer_values, gate_max, weight_sum = load_state(
                partial_state, partial_normalizer, partial_stats, first, count, i_head, H, 0, K, V, BK, BV, FOLD_UNROLL
            )
            if (i_partial // H == first) & (i_piece == 0):
                i_row = i_slot * H + i_head
                store_state(state, normalizer, stats, i_row, 0, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)
        else:
            values, normalizer_values, gate_max, weight_sum = stored_state(state, normalizer, stats, i_slot * H + i_head, 0, K, V, BK, BV)
        row_state = (values * inverse(weight_sum)).to(DOT)
        row_normalizer = normalizer_values * inverse(weight_sum)
    else:
        row_state = 0.0
        row_normalizer = 0.0
    CAN_COPY_AHEAD: tl.constexpr = BT >= 64 and BV >= 64 and DOT == tl.bfloat16
    # in a piece of one block there is nothing to copy ahead
    if CAN_COPY_AHEAD and size > BT:
        emit_output(
            query + start * stride_qt + i_head.to(tl.int64) * stride_qh,
            output_gate + start * stride_zt + i_head.to(tl.int64) * stride_zh,
            norm_weight + i_head * V,
            out + start * stride_ot + i_head.to(tl.int64) * stride_oh,
            state,
            normalizer,
            stats,
            i_slot,
            i_head,
            H,
            row_state,
            row_normalizer,
            num_tokens,
            stride_qt,
            stride_zt,
            stride_ot,
            eps,
            K,
            V,
            BT,
            BK,
            NK,
            BV,
            HAS_OUTPUT_GATE,
            HAS_NORM,
            NORMALIZE,
            RELU,
            DOT,
            True,
        )
    else:
        emit_output(
            query + start * stride_qt + i_head.to(tl.int64) * stride_qh,
            output_gate + start * stride_zt + i_head.to(tl.int64) * stride_zh,
            norm_weight + i_head * V,
            out + start * stride_ot + i_head.to(tl.int64) * stride_oh,
            state,
            normalizer,
            stats,
            i_slot,
            i_head,
            H,
            row_state,
            row_normalizer,
            num_tokens,
            stride_qt,
            stride_zt,
            stride_ot,
            eps,
            K,
            V,
            BT,
            BK,
            NK,
            BV,
            HAS_OUTPUT_GATE,
            HAS_NORM,
            NORMALIZE,
            RELU,
            DOT,
            False,
        )
