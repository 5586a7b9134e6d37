"""The forward kernels: state of a split, combination of splits, output, and a one-launch path for short rows.

A *partial state* is ``(S, n, m, l)``: ``m`` the largest gate of the tokens seen, ``S = sum exp(g - m) phi(k) v^T``, ``n`` and
``l`` the same sums without ``v`` and without ``phi(k) v^T``. Partial states of one row add up to a partial state, so the combined
state of a row has the same form; only ``S / l`` and ``n / l`` enter the output.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G split rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.elementwise import LOG2E, fast_exp2, sigmoid
from gbla_kernels.linear_attention.elementwise import (
    COMBINE_UNROLL,
    feature_map,
    inverse,
    remainder,
    round_to,
    two_columns,
    weighted_feature_map,
)


@triton.jit
def largest_gate(p_gate, num_tokens, stride_gt):
    """Maximum over the tokens, and the same with 0 in place of -inf, which is safe to subtract."""
    largest = tl.full([512], float("-inf"), tl.float32)
    for first in range(0, num_tokens, 512):
        o_t = first + tl.arange(0, 512)
        largest = tl.maximum(largest, tl.load(p_gate + o_t * stride_gt, mask=o_t < num_tokens, other=float("-inf")).to(tl.float32))
    gate_max = tl.max(largest)
    return gate_max, tl.where(gate_max == float("-inf"), 0.0, gate_max)


@triton.jit
def load_gate(p_gate, o_t, num_tokens, stride_gt, HAS_GATE: tl.constexpr):
    """Logits of a block of tokens, -inf past the end; zeros without a gate."""
    if HAS_GATE:
        return tl.load(p_gate + o_t * stride_gt, mask=o_t < num_tokens, other=float("-inf")).to(tl.float32)
    return tl.where(o_t < num_tokens, 0.0, float("-inf"))


@triton.jit
def accumulate_state(
    p_key,
    p_value,
    p_gate,
    num_tokens,
    stride_kt,
    stride_vt,
    stride_gt,
    i_key,
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
    """Partial state of ``num_tokens`` tokens of one head: ``(BK, BV)``, ``(BK,)``, maximum, sum; pointers at the first token."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    gate = load_gate(p_gate, tl.arange(0, BT), num_tokens, stride_gt, HAS_GATE)
    if HAS_GATE:
        gate_max, safe_max = largest_gate(p_gate, num_tokens, stride_gt)
    else:
        gate_max, safe_max = 0.0, 0.0
    # transposed: value goes from memory to the tensor cores without passing through registers
    state = tl.zeros([BV, BK], tl.float32)
    # a sum per position in the block: reduced once, at the end
    normalizer = tl.zeros([BT, BK], tl.float32)
    weight_sum = tl.zeros([BT], tl.float32)
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        key = tl.load(p_key + o_t[:, None] * stride_kt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        value = tl.load(p_value + o_t[:, None] * stride_vt + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0)
        log_weight = (gate - safe_max) * LOG2E
        weight = fast_exp2(log_weight)
        # of the next block: its latency is hidden behind this one
        gate = load_gate(p_gate, o_t + BT, num_tokens, stride_gt, HAS_GATE)
        weight_sum += weight
        weighted = weighted_feature_map(key.to(tl.float32), weight[:, None], log_weight[:, None], RELU, DOT)
        if K != BK * NK:
            weighted = tl.where(m_k[None, :], weighted, 0.0)
        normalizer += weighted
        rounded = round_to(weighted, DOT)
        state = tl.dot(tl.trans(value.to(DOT)), rounded, acc=state, input_precision="tf32x3")
        if DOT != tl.float32:
            # the gradient to query sees the state without its mean, where one rounding of the keys is too coarse
            state = tl.dot(tl.trans(value.to(DOT)), remainder(weighted, rounded, DOT), acc=state)
    return tl.trans(state), tl.sum(normalizer, axis=0), gate_max, tl.sum(weight_sum)


@triton.jit
def load_state(
    state,
    normalizer,
    stats,
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
    """Sum of the partial states ``first .. first + count`` of one head, in this order, ``UNROLL`` of them loaded at once."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_kv = m_k[:, None] & (o_v < V)[None, :]
    o_state = o_k[:, None] * V + o_v[None, :]
    first = first.to(tl.int64)
    o_count = tl.arange(0, 64)
    gates = tl.load(stats + 2 * ((first + o_count) * H + i_head), mask=o_count < count, other=float("-inf"))
    gate_max = tl.max(gates)
    safe_max = tl.where(gate_max == float("-inf"), 0.0, gate_max)
    total = tl.zeros([BK, BV], tl.float32)
    total_normalizer = tl.zeros([BK], tl.float32)
    weight_sum = 0.0
    for base in range(0, count, UNROLL):
        for j in tl.static_range(UNROLL):
            is_used = base + j < count
            i_partial = (first + base + j) * H + i_head
            rescale = fast_exp2((tl.load(stats + 2 * i_partial, mask=is_used, other=float("-inf")) - safe_max) * LOG2E)
            weight_sum += rescale * tl.load(stats + 2 * i_partial + 1, mask=is_used, other=0.0)
            total += rescale * tl.load(state + i_partial * K * V + o_state, mask=m_kv & is_used, other=0.0)
            total_normalizer += rescale * tl.load(normalizer + i_partial * K + o_k, mask=m_k & is_used, other=0.0)
    return total, total_normalizer, gate_max, weight_sum


@triton.jit
def store_state(
    state,
    normalizer,
    stats,
    i_partial,
    i_key,
    K: tl.constexpr,
    V: tl.constexpr,
    values,
    normalizer_values,
    gate_max,
    weight_sum,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """Write a partial state; ``i_partial`` counts heads of splits, or heads of slots."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    i_partial = i_partial.to(tl.int64)
    p_state = state + i_partial * K * V + o_k[:, None] * V + o_v[None, :]
    tl.store(p_state, values, mask=m_k[:, None] & (o_v < V)[None, :])
    tl.store(normalizer + i_partial * K + o_k, normalizer_values, mask=m_k)
    if i_key == 0:
        tl.store(stats + 2 * i_partial, gate_max)
        tl.store(stats + 2 * i_partial + 1, weight_sum)


@triton.jit
def load_normalized_state(
    state,
    normalizer,
    stats,
    i_slot,
    i_head,
    H,
    i_key,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
):
    """``S / l`` as a dot operand and ``n / l``, of a row's combined state."""
    values, normalizer_values, _, weight_sum = load_state(state, normalizer, stats, i_slot, 1, i_head, H, i_key, K, V, BK, BV, 1)
    return (values * inverse(weight_sum)).to(DOT), normalizer_values * inverse(weight_sum)


@triton.jit
def normalized(u, c, eps, V, NORMALIZE: tl.constexpr, HAS_NORM: tl.constexpr):
    """Factor ``f (BT,)`` with ``RMSNorm(u / c) = u f``, or without norm or division as the flags say; 0 where ``c`` is 0."""
    # a compiled graph passes Python floats as fp64
    eps = tl.cast(eps, tl.float32)
    if HAS_NORM:
        mean_square = tl.sum(u * u, axis=1) / V
        if NORMALIZE:
            is_zero = c == 0
            return tl.where(is_zero, 0.0, tl.rsqrt(tl.where(is_zero, 1.0, mean_square + eps * c * c)))
        return tl.rsqrt(mean_square + eps)
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
):
    """Outputs of ``num_tokens`` tokens of one head. With NK == 1 from ``row_state``; else key slices of the state are read again."""
    o_v = tl.arange(0, BV)
    m_v = o_v < V
    if HAS_NORM:
        norm_weight = tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        m_tv = m_t[:, None] & m_v[None, :]
        if HAS_OUTPUT_GATE:
            # loaded early: used last
            z = tl.load(p_output_gate + o_t[:, None] * stride_zt + o_v[None, :], mask=m_tv, other=0.0)
        u = tl.zeros([BT, BV], tl.float32)
        c = tl.zeros([BT, 16], tl.float32)
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
            phi = feature_map(query.to(tl.float32), RELU).to(DOT)
            u = tl.dot(phi, slice_state, acc=u, input_precision="tf32x3")
            if NORMALIZE:
                # padded keys have a zero normalizer
                c = tl.dot(phi, two_columns(slice_normalizer, BK, DOT), acc=c, input_precision="tf32x3")
        y = u * normalized(u, tl.sum(c, axis=1), eps, V, NORMALIZE, HAS_NORM)[:, None]
        if HAS_NORM:
            y = y * norm_weight[None, :]
        if HAS_OUTPUT_GATE:
            z = z.to(tl.float32)
            y = y * (z * sigmoid(z))
        tl.store(p_out + o_t[:, None] * stride_ot + o_v[None, :], y.to(p_out.dtype.element_ty), mask=m_tv)


@triton.jit
def state_kernel(
    key,
    value,
    key_gate,
    splits,
    state,
    normalizer,
    stats,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_gt,
    stride_gh,
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
    """Partial state of one split, head and key slice; grid ``(Z * H * NK,)``."""
    i_program = tl.program_id(0)
    i_key = i_program % NK * BK
    i_partial = i_program // NK
    i_head = i_partial % H
    p_split = splits + 3 * (i_partial // H)
    start = tl.load(p_split + 1)
    num_tokens = (tl.load(p_split + 2) - start).to(tl.int32)
    values, normalizer_values, gate_max, weight_sum = accumulate_state(
        key + start * stride_kt + i_head * stride_kh,
        value + start * stride_vt + i_head * stride_vh,
        key_gate + start * stride_gt + i_head * stride_gh,
        num_tokens,
        stride_kt,
        stride_vt,
        stride_gt,
        i_key,
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
    store_state(state, normalizer, stats, i_partial, i_key, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)


@triton.jit
def combine_states_kernel(
    partial_state,
    partial_normalizer,
    partial_stats,
    slot_offsets,
    state,
    normalizer,
    stats,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """State of one split row, head and key slice; grid ``(G * H, NK)``. A slot without splits gets zeros."""
    i_partial = tl.program_id(0)
    i_key = tl.program_id(1) * BK
    i_head = i_partial % H
    i_slot = i_partial // H
    first = tl.load(slot_offsets + i_slot).to(tl.int32)
    count = tl.load(slot_offsets + i_slot + 1).to(tl.int32) - first
    values, normalizer_values, gate_max, weight_sum = load_state(
        partial_state, partial_normalizer, partial_stats, first, count, i_head, H, i_key, K, V, BK, BV, COMBINE_UNROLL
    )
    store_state(state, normalizer, stats, i_partial, i_key, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)


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

    If ``fold``, the row's partial states are combined here, which saves a launch, and the row's first split writes the result for
    backward; else the combined state is read. Both give the same bits.
    """
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
    if NK == 1:
        if fold:
            first = tl.load(slot_offsets + i_slot).to(tl.int32)
            count = tl.load(slot_offsets + i_slot + 1).to(tl.int32) - first
            # as many as the registers of a thread hold
            FOLD_UNROLL: tl.constexpr = 3 if BK * BV <= 4096 else 2
            values, normalizer_values, gate_max, weight_sum = load_state(
                partial_state, partial_normalizer, partial_stats, first, count, i_head, H, 0, K, V, BK, BV, FOLD_UNROLL
            )
            if (i_partial // H == first) & (i_piece == 0):
                i_row = i_slot * H + i_head
                store_state(state, normalizer, stats, i_row, 0, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)
        else:
            values, normalizer_values, gate_max, weight_sum = load_state(state, normalizer, stats, i_slot, 1, i_head, H, 0, K, V, BK, BV, 1)
        row_state = (values * inverse(weight_sum)).to(DOT)
        row_normalizer = normalizer_values * inverse(weight_sum)
    else:
        row_state = 0.0
        row_normalizer = 0.0
    emit_output(
        query + start * stride_qt + i_head * stride_qh,
        output_gate + start * stride_zt + i_head * stride_zh,
        norm_weight + i_head * V,
        out + start * stride_ot + i_head * stride_oh,
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
    )


@triton.jit
def row_kernel(
    query,
    key,
    value,
    key_gate,
    output_gate,
    norm_weight,
    out,
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
):
    """One short row and head from inputs to outputs, its state never in memory; grid ``(S * H,)``."""
    i_program = tl.program_id(0)
    i_head = i_program % H
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    values, normalizer_values, _, weight_sum = accumulate_state(
        key + start * stride_kt + i_head * stride_kh,
        value + start * stride_vt + i_head * stride_vh,
        key_gate + start * stride_gt + i_head * stride_gh,
        num_tokens,
        stride_kt,
        stride_vt,
        stride_gt,
        0,
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
    emit_output(
        query + start * stride_qt + i_head * stride_qh,
        output_gate + start * stride_zt + i_head * stride_zh,
        norm_weight + i_head * V,
        out + start * stride_ot + i_head * stride_oh,
        out,
        out,
        out,
        0,
        i_head,
        H,
        (values * inverse(weight_sum)).to(DOT),
        normalizer_values * inverse(weight_sum),
        num_tokens,
        stride_qt,
        stride_zt,
        stride_ot,
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
    )
