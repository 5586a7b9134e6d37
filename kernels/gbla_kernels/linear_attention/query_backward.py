"""Backward, query side: dq, dz, and shares of the gradients of the state and of norm_weight; ``u`` and ``c`` are computed again."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.linear_attention.elementwise import (
    add_rows,
    dot_rows,
    feature_map,
    feature_map_slope,
    inverse,
    keep_operand,
    outer_column,
    outer_row,
    product_with_zeros,
    remainder,
    round_like,
    round_to,
    two_columns,
    two_rows,
)
from gbla_kernels.linear_attention.output_gradient import output_gradient
from gbla_kernels.linear_attention.state import stored_state
from gbla_kernels.linear_attention.state_gradient import store_state_gradient


@triton.jit
def centred_state(state, normalizer, centre, DOT: tl.constexpr):
    """``S - n centre^T`` as a dot operand.

    ``phi S = phi (S - n r^T) + c r`` and ``du S^T = du (S - n r^T)^T + (du . r) n`` for any ``r``. With a mean of the values as ``r``
    what is left is small, and so is the error of its rounding: the gradient to query is all made of it.
    """
    return (state - normalizer[:, None] * centre[None, :]).to(DOT)


@triton.jit
def state_centre(state, normalizer, HAS_NORM: tl.constexpr, NORMALIZE: tl.constexpr):
    """``(BV,)``: a weighted mean of the row's values; zero where the output keeps the state's scale."""
    total = tl.sum(normalizer)
    if not HAS_NORM and not NORMALIZE:
        total = 0.0
    return tl.where(total > 0, tl.sum(state, axis=0) / tl.where(total > 0, total, 1.0), 0.0)


@triton.jit
def load_centred_state(
    state,
    normalizer,
    stats,
    i_slot,
    i_head,
    H,
    i_key,
    centre,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """A key slice of a row's state over its sum of weights, centred, and its normalizer."""
    values, normalizer_values, _, weight_sum = stored_state(state, normalizer, stats, i_slot * H + i_head, i_key, K, V, BK, BV)
    normalizer_values = normalizer_values * inverse(weight_sum)
    return centred_state(values * inverse(weight_sum), normalizer_values, centre, DOT), normalizer_values


@triton.jit
def query_backward(
    p_query,
    p_output_gate,
    p_norm_weight,
    p_d_out,
    p_d_query,
    p_d_output_gate,
    state,
    normalizer,
    stats,
    i_slot,
    i_head,
    H,
    row_state,
    row_normalizer,
    centre,
    i_slice,
    num_tokens,
    stride_qt,
    stride_zt,
    stride_ot,
    stride_dqt,
    stride_dzt,
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
    IS_PURE: tl.constexpr,
):
    """Writes dq (of key slice ``i_slice``) and dz of some tokens of one head.

    Returns their share of dS ``(BK, BV)``, dn ``(BK,)``, d norm_weight ``(BV,)`` and the bracket of the gate's gradient,
    ``<S, dS> + <n, dn> = sum_t u_t . du_t + c_t dc_t``. With the division on it is zero but for rounding; in fp32, subtracting
    what it comes to takes the error common to all tokens out of the gate's gradient.
    """
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    o_own = i_slice * BK + tl.arange(0, BK)
    m_own = o_own < K
    d_state = tl.zeros([BK, BV], tl.float32)
    # a block of 16 tokens is summed directly: a product would take registers that short rows lack
    if BT > 16:
        d_normalizer = tl.zeros([BK, 16], tl.float32)
    else:
        d_normalizer = tl.zeros([BK], tl.float32)
    d_norm_weight = tl.zeros([BV, 16], tl.float32)
    brackets = tl.zeros([BT], tl.float32)
    rows = dot_rows(BT, BV, DOT)
    # on the tensor cores, so that neither vector takes registers
    OUTER_PRODUCTS: tl.constexpr = BT >= 64 and DOT == tl.bfloat16
    norm_weight = tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32) if HAS_NORM else 0.0
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        m_tv = m_t[:, None] & m_v[None, :]
        m_tk = m_t[:, None] & m_own[None, :]
        # loaded early, used late
        d_y = tl.load(p_d_out + o_t[:, None] * stride_ot + o_v[None, :], mask=m_tv, other=0.0)
        if HAS_OUTPUT_GATE:
            z = tl.load(p_output_gate + o_t[:, None] * stride_zt + o_v[None, :], mask=m_tv, other=0.0)
        u = tl.zeros([BT, BV], tl.float32)
        c = tl.zeros([BT, 8], tl.float32)
        for j in tl.static_range(NK):
            if NK == 1:
                slice_state, slice_normalizer = row_state, row_normalizer
            else:
                slice_state, slice_normalizer = load_centred_state(
                    state, normalizer, stats, i_slot, i_head, H, j * BK, centre, K, V, BK, BV, DOT
                )
            o_k = j * BK + tl.arange(0, BK)
            m_k = o_k < K
            query = tl.load(p_query + o_t[:, None] * stride_qt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
            phi = feature_map(query.to(tl.float32), RELU)
            if K != BK * NK:
                phi = tl.where(m_k[None, :], phi, 0.0)
            phi = round_like(phi, rows, DOT, IS_PURE)
            u = tl.dot(phi, slice_state, acc=u, input_precision="tf32x3")
            if HAS_NORM or NORMALIZE:
                c = tl.dot(phi, two_columns(slice_normalizer, BK, DOT), acc=c, input_precision="tf32x3")
        c = tl.sum(c, axis=1)
        if BT >= 64 and DOT == tl.bfloat16 and not (HAS_NORM and NORMALIZE):
            # else these hang on the sums of d norm_weight and dn
            products = product_with_zeros(query, tl.zeros([BT, 16], tl.float32), DOT)
            if not HAS_NORM:
                products = product_with_zeros(d_y, products, DOT)
                if HAS_OUTPUT_GATE:
                    products = product_with_zeros(z, products, DOT)
            c = keep_operand(c, tl.sum(products, axis=1))
        if HAS_NORM or NORMALIZE:
            if OUTER_PRODUCTS:
                u = tl.dot(outer_column(c, BT, DOT), outer_row(centre, BV, DOT), acc=u)
            else:
                u += c[:, None] * centre[None, :]
        if NK == 1:
            own_state, own_normalizer = row_state, row_normalizer
        else:
            own_state, own_normalizer = load_centred_state(
                state, normalizer, stats, i_slot, i_head, H, i_slice * BK, centre, K, V, BK, BV, DOT
            )
            query = tl.load(p_query + o_t[:, None] * stride_qt + o_own[None, :], mask=m_tk, other=0.0)
            phi = round_like(tl.where(m_own[None, :], feature_map(query.to(tl.float32), RELU), 0.0), rows, DOT, IS_PURE)
        if not HAS_OUTPUT_GATE:
            z = d_y
        p_dz = p_d_output_gate + o_t[:, None] * stride_dzt + o_v[None, :]
        d_u, d_c, weight_share = output_gradient(
            *(u, c, d_y.to(tl.float32), z.to(tl.float32), norm_weight, p_dz, m_tv & (i_slice == 0)),
            *(eps, V, HAS_OUTPUT_GATE, HAS_NORM, NORMALIZE),
        )
        if HAS_NORM:
            d_norm_weight = add_rows(d_norm_weight, weight_share, BT, DOT)
            if BT >= 32 and DOT == tl.bfloat16:
                products = product_with_zeros(tl.trans(d_y), tl.zeros([BV, 16], tl.float32), DOT)
                if HAS_OUTPUT_GATE:
                    products = product_with_zeros(tl.trans(z), products, DOT)
                d_norm_weight = keep_operand(d_norm_weight, products)
        if DOT == tl.float32 or not NORMALIZE:
            brackets += tl.sum(u * d_u, axis=1) + c * d_c
        rounded = round_to(d_u, DOT)
        d_state = tl.dot(tl.trans(phi), rounded, acc=d_state, input_precision="tf32x3")
        d_phi = tl.dot(rounded, tl.trans(own_state), input_precision="tf32x3")
        if DOT != tl.float32:
            rest = remainder(d_u, rounded, DOT)
            d_state = tl.dot(tl.trans(phi), rest, acc=d_state)
            d_phi = tl.dot(rest, tl.trans(own_state), acc=d_phi)
        if HAS_NORM or NORMALIZE:
            along_normalizer = d_c + tl.sum(d_u * centre[None, :], axis=1)
            if OUTER_PRODUCTS:
                d_phi = tl.dot(outer_column(along_normalizer, BT, DOT), outer_row(own_normalizer, BK, DOT), acc=d_phi)
            else:
                d_phi += along_normalizer[:, None] * own_normalizer[None, :]
        if NORMALIZE:
            if BT > 16:
                d_normalizer = tl.dot(tl.trans(phi), tl.trans(two_rows(d_c, BT, DOT)), acc=d_normalizer, input_precision="tf32x3")
                if BT >= 32 and DOT == tl.bfloat16:
                    products = product_with_zeros(tl.trans(query), tl.zeros([BK, 16], tl.float32), DOT)
                    d_normalizer = keep_operand(d_normalizer, products)
            else:
                d_normalizer += tl.sum(phi.to(tl.float32) * d_c[:, None], axis=0)
        d_query = d_phi * feature_map_slope(query.to(tl.float32), RELU)
        p_dq = p_d_query + o_t[:, None] * stride_dqt + o_own[None, :]
        tl.store(p_dq, d_query.to(p_d_query.dtype.element_ty), mask=m_tk)
    if BT > 16:
        d_normalizer = tl.sum(d_normalizer, axis=1)
    return d_state, d_normalizer, tl.sum(d_norm_weight, axis=1), tl.sum(brackets)


@triton.jit(do_not_specialize=["first_share"])
def query_backward_kernel(
    query,
    output_gate,
    norm_weight,
    d_out,
    d_query,
    d_output_gate,
    splits,
    state,
    normalizer,
    stats,
    d_state,
    d_normalizer,
    brackets,
    d_norm_weight,
    first_share,
    stride_qt,
    stride_qh,
    stride_zt,
    stride_zh,
    stride_ot,
    stride_oh,
    stride_dqt,
    stride_dqh,
    stride_dzt,
    stride_dzh,
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
    IS_PURE: tl.constexpr,
):
    """Query side of one split, head and key slice; grid ``(Z * H * NK,)``; shares of dS, dn and d norm_weight per split."""
    i_program = tl.program_id(0)
    i_slice = i_program % NK
    i_partial = i_program // NK
    i_head = (i_partial % H).to(tl.int64)
    # loaded here, not in a function: the compiler's analysis of writes loses values that functions return
    p_split = splits + 3 * (i_partial // H)
    i_slot = tl.load(p_split).to(tl.int32)
    start = tl.load(p_split + 1)
    num_tokens = (tl.load(p_split + 2) - start).to(tl.int32)
    if NK == 1:
        values, normalizer_values, _, weight_sum = stored_state(state, normalizer, stats, i_slot * H + i_head, 0, K, V, BK, BV)
        values = values * inverse(weight_sum)
        row_normalizer = normalizer_values * inverse(weight_sum)
        centre = state_centre(values, row_normalizer, HAS_NORM, NORMALIZE)
        row_state = centred_state(values, row_normalizer, centre, DOT)
    else:
        # any centre is right: that of the first slice
        values, normalizer_values, _, weight_sum = stored_state(state, normalizer, stats, i_slot * H + i_head, 0, K, V, BK, BV)
        centre = state_centre(values, normalizer_values, HAS_NORM, NORMALIZE)
        row_state, row_normalizer = 0.0, 0.0
    values, normalizer_values, weight_values, bracket = query_backward(
        query + start * stride_qt + i_head * stride_qh,
        output_gate + start * stride_zt + i_head * stride_zh,
        norm_weight + i_head * V,
        d_out + start * stride_ot + i_head * stride_oh,
        d_query + start * stride_dqt + i_head * stride_dqh,
        d_output_gate + start * stride_dzt + i_head * stride_dzh,
        state,
        normalizer,
        stats,
        i_slot,
        i_head,
        H,
        row_state,
        row_normalizer,
        centre,
        i_slice,
        num_tokens,
        stride_qt,
        stride_zt,
        stride_ot,
        stride_dqt,
        stride_dzt,
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
        IS_PURE,
    )
    store_state_gradient(d_state, d_normalizer, brackets, i_partial, i_slice * BK, K, V, values, normalizer_values, bracket, BK, BV)
    if HAS_NORM:
        o_v = tl.arange(0, BV)
        i_share = i_partial.to(tl.int64) + first_share * H
        tl.store(d_norm_weight + i_share * V + o_v, weight_values, mask=(o_v < V) & (i_slice == 0))
