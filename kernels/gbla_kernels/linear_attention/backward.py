"""The backward kernels: token gradients on the query side, the state's gradient, token gradients on the key side.

The forward saves the combined state of split rows only. ``u``, ``c`` and the weights are computed again; short rows compute
their state again too. The same flags and letters as in ``forward.py``.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G split rows, S short rows (docs/shapes.md)

import triton
import triton.language as tl

from gbla_kernels.elementwise import LOG2E, fast_exp2, sigmoid
from gbla_kernels.linear_attention.elementwise import (
    COMBINE_UNROLL,
    add_rows,
    dot_rows,
    feature_map,
    feature_map_slope,
    inverse,
    remainder,
    round_like,
    round_to,
    two_columns,
)
from gbla_kernels.linear_attention.forward import accumulate_state, load_gate, load_state, normalized


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
    values, normalizer_values, _, weight_sum = load_state(state, normalizer, stats, i_slot, 1, i_head, H, i_key, K, V, BK, BV, 1)
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
    IS_TRACED: tl.constexpr,
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
    if BT > 16:
        d_normalizer = tl.zeros([BK, 16], tl.float32)
    else:
        d_normalizer = tl.zeros([BK], tl.float32)
    d_norm_weight = tl.zeros([BV, 16], tl.float32)
    brackets = tl.zeros([BT], tl.float32)
    rows = dot_rows(BT, BV, DOT)
    if HAS_NORM:
        norm_weight = tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
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
        c = tl.zeros([BT, 16], tl.float32)
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
            phi = round_like(phi, rows, DOT, IS_TRACED)
            u = tl.dot(phi, slice_state, acc=u, input_precision="tf32x3")
            if HAS_NORM or NORMALIZE:
                c = tl.dot(phi, two_columns(slice_normalizer, BK, DOT), acc=c, input_precision="tf32x3")
        c = tl.sum(c, axis=1)
        if HAS_NORM or NORMALIZE:
            u += c[:, None] * centre[None, :]
        if NK == 1:
            own_state, own_normalizer = row_state, row_normalizer
        else:
            own_state, own_normalizer = load_centred_state(
                state, normalizer, stats, i_slot, i_head, H, i_slice * BK, centre, K, V, BK, BV, DOT
            )
            query = tl.load(p_query + o_t[:, None] * stride_qt + o_own[None, :], mask=m_tk, other=0.0)
            phi = round_like(tl.where(m_own[None, :], feature_map(query.to(tl.float32), RELU), 0.0), rows, DOT, IS_TRACED)
        factor = normalized(u, c, eps, V, NORMALIZE, HAS_NORM)
        d_y = d_y.to(tl.float32)
        # along: d_normed . u
        weighted = d_y * norm_weight[None, :] if HAS_NORM else d_y
        if HAS_OUTPUT_GATE:
            z = z.to(tl.float32)
            gate = sigmoid(z)
            silu = z * gate
            d_gate = weighted * (u * factor[:, None]) * (gate + silu - silu * gate)
            p_d_gate = p_d_output_gate + o_t[:, None] * stride_dzt + o_v[None, :]
            tl.store(p_d_gate, d_gate.to(p_d_output_gate.dtype.element_ty), mask=m_tv & (i_slice == 0))
            d_y = d_y * silu
            d_normed = weighted * silu
        else:
            d_normed = weighted
        if HAS_NORM:
            d_norm_weight = add_rows(d_norm_weight, d_y * (u * factor[:, None]), BT, DOT)
        if HAS_NORM or NORMALIZE:
            along = tl.sum(d_normed * u, axis=1)
        d_c = tl.zeros([BT], tl.float32)
        if HAS_NORM:
            cubed = factor * factor * factor * along
            d_u = d_normed * factor[:, None] - u * (cubed / V)[:, None]
            if NORMALIZE:
                d_c = -cubed * tl.cast(eps, tl.float32) * c
        elif NORMALIZE:
            d_u = d_normed * factor[:, None]
            d_c = -factor * factor * along
        else:
            d_u = d_normed
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
            d_phi += (d_c + tl.sum(d_u * centre[None, :], axis=1))[:, None] * own_normalizer[None, :]
        if NORMALIZE:
            if BT > 16:
                d_normalizer = add_rows(d_normalizer, phi.to(tl.float32) * d_c[:, None], BT, DOT)
            else:
                d_normalizer += tl.sum(phi.to(tl.float32) * d_c[:, None], axis=0)
        d_query = d_phi * feature_map_slope(query.to(tl.float32), RELU)
        p_dq = p_d_query + o_t[:, None] * stride_dqt + o_own[None, :]
        tl.store(p_dq, d_query.to(p_d_query.dtype.element_ty), mask=m_tk)
    if BT > 16:
        d_normalizer = tl.sum(d_normalizer, axis=1)
    return d_state, d_normalizer, tl.sum(d_norm_weight, axis=1), tl.sum(brackets)


@triton.jit
def key_backward(
    p_key,
    p_value,
    p_gate,
    p_d_key,
    p_d_value,
    p_d_gate,
    d_state,
    d_normalizer,
    brackets,
    i_slot,
    i_head,
    H,
    row_d_state,
    row_d_state_rest,
    row_d_normalizer,
    gate_max,
    inverse_sum,
    bracket,
    num_tokens,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_dkt,
    stride_dvt,
    stride_dgt,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
):
    """Writes dk, dv and dg of some tokens of one head, ``dg_t = a_t (da_t - bracket)``."""
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    safe_max = tl.where(gate_max == float("-inf"), 0.0, gate_max)
    gate = load_gate(p_gate, tl.arange(0, BT), num_tokens, stride_gt, HAS_GATE)
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        m_tv = m_t[:, None] & m_v[None, :]
        value = tl.load(p_value + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32).to(DOT)
        weight = fast_exp2((gate - safe_max) * LOG2E) * inverse_sum
        # of the next block: its latency is hidden behind this one
        gate = load_gate(p_gate, o_t + BT, num_tokens, stride_gt, HAS_GATE)
        d_value = tl.zeros([BT, BV], tl.float32)
        d_weight = tl.zeros([BT], tl.float32)
        for j in range(NK):
            o_k = j * BK + tl.arange(0, BK)
            m_k = o_k < K
            m_tk = m_t[:, None] & m_k[None, :]
            if NK == 1:
                slice_d_state, slice_rest, slice_d_normalizer = row_d_state, row_d_state_rest, row_d_normalizer
            else:
                slice_values, slice_d_normalizer, _ = load_state_gradient(
                    d_state, d_normalizer, brackets, i_slot, 1, i_head, H, j * BK, K, V, BK, BV, 1
                )
                slice_d_state = slice_values.to(DOT)
                slice_rest = remainder(slice_values, slice_d_state, DOT)
            key = tl.load(p_key + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
            phi = feature_map(key, RELU)
            d_value = tl.dot((phi * weight[:, None]).to(DOT), slice_d_state, acc=d_value, input_precision="tf32x3")
            # padded keys: d_state and d_normalizer are zero there
            d_phi = tl.dot(value, tl.trans(slice_d_state), input_precision="tf32x3")
            if DOT != tl.float32:
                d_phi = tl.dot(value, tl.trans(slice_rest), acc=d_phi)
            d_phi += slice_d_normalizer[None, :]
            d_weight += tl.sum(phi * d_phi, axis=1)
            d_key = weight[:, None] * d_phi * feature_map_slope(key, RELU)
            p_dk = p_d_key + o_t[:, None] * stride_dkt + o_k[None, :]
            tl.store(p_dk, d_key.to(p_d_key.dtype.element_ty), mask=m_tk)
        p_dv = p_d_value + o_t[:, None] * stride_dvt + o_v[None, :]
        tl.store(p_dv, d_value.to(p_d_value.dtype.element_ty), mask=m_tv)
        if HAS_GATE:
            d_gate = weight * (d_weight - bracket)
            tl.store(p_d_gate + o_t * stride_dgt, d_gate.to(p_d_gate.dtype.element_ty), mask=m_t)


@triton.jit
def load_state_gradient(
    d_state,
    d_normalizer,
    brackets,
    first,
    count,
    i_head,
    H,
    i_key,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Sum of the shares ``first .. first + count`` of one head's dS, dn and bracket, in this order, ``UNROLL`` loaded at once."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_kv = m_k[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    first = first.to(tl.int64)
    total = tl.zeros([BK, BV], tl.float32)
    total_normalizer = tl.zeros([BK], tl.float32)
    bracket = 0.0
    for base in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):
            is_used = base + j < count
            i_partial = (first + base + j) * H + i_head
            bracket += tl.load(brackets + i_partial, mask=is_used, other=0.0)
            total += tl.load(d_state + i_partial * K * V + o_state, mask=m_kv & is_used, other=0.0)
            total_normalizer += tl.load(d_normalizer + i_partial * K + o_k, mask=m_k & is_used, other=0.0)
    return total, total_normalizer, bracket


@triton.jit
def store_state_gradient(
    d_state,
    d_normalizer,
    brackets,
    i_partial,
    i_key,
    K: tl.constexpr,
    V: tl.constexpr,
    values,
    normalizer_values,
    bracket,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Write dS, dn and the bracket of a split or a slot."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    i_partial = i_partial.to(tl.int64)
    p_state = d_state + i_partial * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_state, values, mask=m_k[:, None] & (o_v < V)[None, :])
    tl.store(d_normalizer + i_partial * K + o_k, normalizer_values, mask=m_k)
    if i_key == 0:
        tl.store(brackets + i_partial, bracket)


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
    IS_TRACED: tl.constexpr,
):
    """Query side of one split, head and key slice; grid ``(Z * H * NK,)``; shares of dS, dn and d norm_weight per split."""
    i_program = tl.program_id(0)
    i_slice = i_program % NK
    i_partial = i_program // NK
    i_head = i_partial % H
    # loaded here, not in a function: the compiler's analysis of writes loses values that functions return
    p_split = splits + 3 * (i_partial // H)
    i_slot = tl.load(p_split).to(tl.int32)
    start = tl.load(p_split + 1)
    num_tokens = (tl.load(p_split + 2) - start).to(tl.int32)
    if NK == 1:
        values, normalizer_values, _, weight_sum = load_state(state, normalizer, stats, i_slot, 1, i_head, H, 0, K, V, BK, BV, 1)
        values = values * inverse(weight_sum)
        row_normalizer = normalizer_values * inverse(weight_sum)
        centre = state_centre(values, row_normalizer, HAS_NORM, NORMALIZE)
        row_state = centred_state(values, row_normalizer, centre, DOT)
    else:
        # any centre is right: that of the first slice
        values, normalizer_values, _, weight_sum = load_state(state, normalizer, stats, i_slot, 1, i_head, H, 0, K, V, BK, BV, 1)
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
        IS_TRACED,
    )
    store_state_gradient(d_state, d_normalizer, brackets, i_partial, i_slice * BK, K, V, values, normalizer_values, bracket, BK, BV)
    if HAS_NORM:
        o_v = tl.arange(0, BV)
        i_share = i_partial.to(tl.int64) + first_share * H
        tl.store(d_norm_weight + i_share * V + o_v, weight_values, mask=(o_v < V) & (i_slice == 0))


@triton.jit
def combine_gradients_kernel(
    partial_d_state,
    partial_d_normalizer,
    partial_brackets,
    slot_offsets,
    d_state,
    d_normalizer,
    brackets,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Gradients dS and dn of one split row, head and key slice; grid ``(G * H, NK)``."""
    i_row = tl.program_id(0)
    i_key = tl.program_id(1) * BK
    first = tl.load(slot_offsets + i_row // H).to(tl.int32)
    count = tl.load(slot_offsets + i_row // H + 1).to(tl.int32) - first
    values, normalizer_values, bracket = load_state_gradient(
        partial_d_state, partial_d_normalizer, partial_brackets, first, count, i_row % H, H, i_key, K, V, BK, BV, COMBINE_UNROLL
    )
    store_state_gradient(d_state, d_normalizer, brackets, i_row, i_key, K, V, values, normalizer_values, bracket, BK, BV)


@triton.jit(do_not_specialize=["fold", "pieces"])
def key_backward_kernel(
    key,
    value,
    key_gate,
    d_key,
    d_value,
    d_key_gate,
    splits,
    slot_offsets,
    stats,
    partial_d_state,
    partial_d_normalizer,
    partial_brackets,
    d_state,
    d_normalizer,
    brackets,
    fold,
    pieces,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    stride_dgt,
    stride_dgh,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    NK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
):
    """Key side of a piece of one split and head; grid ``(Z * H * pieces,)``. If ``fold``, the splits' shares of dS are added here."""
    i_piece = tl.program_id(0) % pieces
    i_partial = tl.program_id(0) // pieces
    i_head = i_partial % H
    # loaded here, not in a function: the compiler's analysis of writes loses values that functions return
    p_split = splits + 3 * (i_partial // H)
    i_slot = tl.load(p_split).to(tl.int32)
    start = tl.load(p_split + 1)
    num_tokens = (tl.load(p_split + 2) - start).to(tl.int32)
    size = tl.cdiv(tl.cdiv(num_tokens, pieces), BT) * BT
    start += i_piece * size
    num_tokens = tl.minimum(num_tokens - i_piece * size, size)
    i_row = i_slot.to(tl.int64) * H + i_head
    gate_max = tl.load(stats + 2 * i_row)
    inverse_sum = inverse(tl.load(stats + 2 * i_row + 1))
    if NK == 1:
        if fold:
            first = tl.load(slot_offsets + i_slot).to(tl.int32)
            count = tl.load(slot_offsets + i_slot + 1).to(tl.int32) - first
            FOLD_UNROLL: tl.constexpr = 3 if BK * BV <= 4096 else 2
            row_d_state, row_d_normalizer, bracket = load_state_gradient(
                partial_d_state, partial_d_normalizer, partial_brackets, first, count, i_head, H, 0, K, V, BK, BV, FOLD_UNROLL
            )
        else:
            row_d_state, row_d_normalizer, bracket = load_state_gradient(
                d_state, d_normalizer, brackets, i_slot, 1, i_head, H, 0, K, V, BK, BV, 1
            )
        operand, operand_normalizer = row_d_state.to(DOT), row_d_normalizer
        operand_rest = remainder(row_d_state, operand, DOT)
    else:
        operand, operand_rest, operand_normalizer = 0.0, 0.0, 0.0
        bracket = tl.load(brackets + i_row)
    key_backward(
        key + start * stride_kt + i_head * stride_kh,
        value + start * stride_vt + i_head * stride_vh,
        key_gate + start * stride_gt + i_head * stride_gh,
        d_key + start * stride_dkt + i_head * stride_dkh,
        d_value + start * stride_dvt + i_head * stride_dvh,
        d_key_gate + start * stride_dgt + i_head * stride_dgh,
        d_state,
        d_normalizer,
        brackets,
        i_slot,
        i_head,
        H,
        operand,
        operand_rest,
        operand_normalizer,
        gate_max,
        inverse_sum,
        bracket,
        num_tokens,
        stride_kt,
        stride_vt,
        stride_gt,
        stride_dkt,
        stride_dvt,
        stride_dgt,
        K,
        V,
        BT,
        BK,
        NK,
        BV,
        HAS_GATE,
        RELU,
        DOT,
    )


@triton.jit
def row_backward_kernel(
    query,
    key,
    value,
    key_gate,
    output_gate,
    norm_weight,
    d_out,
    d_query,
    d_key,
    d_value,
    d_key_gate,
    d_output_gate,
    d_norm_weight,
    short_rows,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
    stride_zt,
    stride_zh,
    stride_ot,
    stride_oh,
    stride_dqt,
    stride_dqh,
    stride_dkt,
    stride_dkh,
    stride_dvt,
    stride_dvh,
    stride_dgt,
    stride_dgh,
    stride_dzt,
    stride_dzh,
    H,
    eps,
    K: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    IS_TRACED: tl.constexpr,
):
    """All gradients of one short row and head; grid ``(S * H,)``; its share of d norm_weight is written per row."""
    i_program = tl.program_id(0)
    i_head = i_program % H
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    p_key = key + start * stride_kt + i_head * stride_kh
    p_value = value + start * stride_vt + i_head * stride_vh
    p_gate = key_gate + start * stride_gt + i_head * stride_gh
    state, normalizer, gate_max, weight_sum = accumulate_state(
        p_key, p_value, p_gate, num_tokens, stride_kt, stride_vt, stride_gt, 0, K, V, BT, BK, 1, BV, HAS_GATE, RELU, DOT
    )
    inverse_sum = inverse(weight_sum)
    state = state * inverse_sum
    normalizer = normalizer * inverse_sum
    centre = state_centre(state, normalizer, HAS_NORM, NORMALIZE)
    d_state, d_normalizer, weight_values, bracket = query_backward(
        query + start * stride_qt + i_head * stride_qh,
        output_gate + start * stride_zt + i_head * stride_zh,
        norm_weight + i_head * V,
        d_out + start * stride_ot + i_head * stride_oh,
        d_query + start * stride_dqt + i_head * stride_dqh,
        d_output_gate + start * stride_dzt + i_head * stride_dzh,
        query,
        query,
        query,
        0,
        i_head,
        H,
        centred_state(state, normalizer, centre, DOT),
        normalizer,
        centre,
        0,
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
        1,
        BV,
        HAS_OUTPUT_GATE,
        HAS_NORM,
        NORMALIZE,
        RELU,
        DOT,
        IS_TRACED,
    )
    if HAS_NORM:
        o_v = tl.arange(0, BV)
        tl.store(d_norm_weight + i_program.to(tl.int64) * V + o_v, weight_values, mask=o_v < V)
    operand = d_state.to(DOT)
    key_backward(
        p_key,
        p_value,
        p_gate,
        d_key + start * stride_dkt + i_head * stride_dkh,
        d_value + start * stride_dvt + i_head * stride_dvh,
        d_key_gate + start * stride_dgt + i_head * stride_dgh,
        query,
        query,
        query,
        0,
        i_head,
        H,
        operand,
        remainder(d_state, operand, DOT),
        d_normalizer,
        gate_max,
        inverse_sum,
        bracket,
        num_tokens,
        stride_kt,
        stride_vt,
        stride_gt,
        stride_dkt,
        stride_dvt,
        stride_dgt,
        K,
        V,
        BT,
        BK,
        1,
        BV,
        HAS_GATE,
        RELU,
        DOT,
    )
