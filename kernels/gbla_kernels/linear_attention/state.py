"""The state of a row: partial states of its splits, and their combination.

A *partial state* is ``(S, n, m, l)``: ``m`` the largest gate of the tokens seen, ``S = sum exp(g - m) phi(k) v^T``, ``n`` and
``l`` the same sums without ``v`` and without ``phi(k) v^T``. Partial states of one row add up to a partial state, so the combined
state of a row has the same form; only ``S / l`` and ``n / l`` enter the output.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.elementwise import LOG2E, fast_exp2
from gbla_kernels.linear_attention.elementwise import COMBINE_UNROLL, FEW_SPLITS, inverse, remainder, round_to, weighted_feature_map


@triton.jit
def finite(gate_max):
    """A maximum that is safe to subtract: 0 in place of -inf."""
    return tl.where(gate_max == float("-inf"), 0.0, gate_max)


@triton.jit
def gate_statistics(p_gate, num_tokens, stride_gt):
    """Maximum over the tokens, and 512 parts of ``sum exp(g - max)``.

    Summed here, not beside the keys: there the gates would be loaded a second time, in another layout.
    """
    largest = tl.full([512], float("-inf"), tl.float32)
    weights = tl.zeros([512], tl.float32)
    for first in range(0, num_tokens, 512):
        o_t = first + tl.arange(0, 512)
        gate = tl.load(p_gate + o_t * stride_gt, mask=o_t < num_tokens, other=float("-inf")).to(tl.float32)
        new_largest = tl.maximum(largest, gate)
        weights *= fast_exp2((largest - finite(new_largest)) * LOG2E)
        weights += fast_exp2((gate - finite(new_largest)) * LOG2E)
        largest = new_largest
    gate_max = tl.max(largest)
    return gate_max, weights * fast_exp2((largest - finite(gate_max)) * LOG2E)


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
    FOR_BACKWARD: tl.constexpr,
):
    """Partial state of ``num_tokens`` tokens of one head: ``(BK, BV)``, ``(BK,)``, maximum, sum; pointers at the first token."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    m_v = o_v < V
    gate = load_gate(p_gate, tl.arange(0, BT), num_tokens, stride_gt, HAS_GATE)
    if HAS_GATE:
        gate_max, weights = gate_statistics(p_gate, num_tokens, stride_gt)
        safe_max = finite(gate_max)
    else:
        gate_max, safe_max = 0.0, 0.0
    # transposed: value goes from memory to the tensor cores without passing through registers
    state = tl.zeros([BV, BK], tl.float32)
    # tokens that four warps load at once, 16 bytes a thread: those this far apart lie in one thread, which adds them up by itself
    WAVE: tl.constexpr = 1024 // BK if BT >= 64 and BK >= 16 else BT
    # a sum per position in the wave: reduced over these once, at the end
    normalizer = tl.zeros([WAVE, BK], tl.float32)
    for first in range(0, num_tokens, BT):
        o_t = first + tl.arange(0, BT)
        m_t = o_t < num_tokens
        key = tl.load(p_key + o_t[:, None] * stride_kt + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0)
        value = tl.load(p_value + o_t[:, None] * stride_vt + o_v[None, :], mask=m_t[:, None] & m_v[None, :], other=0.0)
        log_weight = (gate - safe_max) * LOG2E
        weight = fast_exp2(log_weight)
        # of the next block: its latency is hidden behind this one
        gate = load_gate(p_gate, o_t + BT, num_tokens, stride_gt, HAS_GATE)
        weighted = weighted_feature_map(key.to(tl.float32), weight[:, None], log_weight[:, None], RELU, DOT)
        if K != BK * NK:
            weighted = tl.where(m_k[None, :], weighted, 0.0)
        normalizer += weighted if WAVE == BT else tl.sum(tl.reshape(weighted, [BT // WAVE, WAVE, BK]), axis=0)
        rounded = round_to(weighted, DOT)
        state = tl.dot(tl.trans(value.to(DOT)), rounded, acc=state, input_precision="tf32x3")
        if FOR_BACKWARD and DOT != tl.float32:
            # the gradient to query sees the state without its mean, where one rounding of the keys is too coarse
            state = tl.dot(tl.trans(value.to(DOT)), remainder(weighted, rounded, DOT), acc=state)
    weight_sum = tl.sum(weights) if HAS_GATE else num_tokens.to(tl.float32)
    return tl.trans(state), tl.sum(normalizer, axis=0), gate_max, weight_sum


@triton.jit
def splits_of_row(slot_offsets, i_slot, fold):
    """First split of a row, and how many it has. Where ``fold`` is 0, ``(0, 1)`` without a load: more than ``fold``."""
    first, count = 0, 1
    if fold:
        first = tl.load(slot_offsets + i_slot).to(tl.int32)
        count = tl.load(slot_offsets + i_slot + 1).to(tl.int32) - first
    return first, count


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
    safe_max = finite(gate_max)
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
def stored_state(
    state,
    normalizer,
    stats,
    i_partial,
    i_key,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """What ``store_state`` wrote: ``(BK, BV)``, ``(BK,)``, largest gate, sum of weights; ``load_state`` would wait for the gate first."""
    o_k = i_key + tl.arange(0, BK)
    o_v = tl.arange(0, BV)
    m_k = o_k < K
    i_partial = i_partial.to(tl.int64)
    p_state = state + i_partial * K * V + o_k[:, None] * V + o_v[None, :]
    values = tl.load(p_state, mask=m_k[:, None] & (o_v < V)[None, :], other=0.0)
    normalizer_values = tl.load(normalizer + i_partial * K + o_k, mask=m_k, other=0.0)
    return values, normalizer_values, tl.load(stats + 2 * i_partial), tl.load(stats + 2 * i_partial + 1)


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
    values, normalizer_values, _, weight_sum = stored_state(state, normalizer, stats, i_slot * H + i_head, i_key, K, V, BK, BV)
    return (values * inverse(weight_sum)).to(DOT), normalizer_values * inverse(weight_sum)


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
    FOR_BACKWARD: tl.constexpr,
):
    """Partial state of one split, head and key slice; grid ``(Z * H * NK,)``."""
    i_program = tl.program_id(0)
    i_key = i_program % NK * BK
    i_partial = i_program // NK
    i_head = (i_partial % H).to(tl.int64)
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
        FOR_BACKWARD,
    )
    store_state(state, normalizer, stats, i_partial, i_key, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)


@triton.jit(do_not_specialize=["fold"])
def combine_states_kernel(
    partial_state,
    partial_normalizer,
    partial_stats,
    slot_offsets,
    state,
    normalizer,
    stats,
    fold,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
):
    """State of one row of more than ``fold`` splits, head and key block; grid ``(G * H, blocks of BK keys)``.

    A slot without splits gets zeros.
    """
    i_partial = tl.program_id(0)
    i_key = tl.program_id(1) * BK
    i_head = (i_partial % H).to(tl.int64)
    i_slot = i_partial // H
    first = tl.load(slot_offsets + i_slot).to(tl.int32)
    count = tl.load(slot_offsets + i_slot + 1).to(tl.int32) - first
    if (count > fold) | (count == 0):
        if count <= FEW_SPLITS:
            values, normalizer_values, gate_max, weight_sum = load_state(
                partial_state, partial_normalizer, partial_stats, first, count, i_head, H, i_key, K, V, BK, BV, FEW_SPLITS
            )
        else:
            values, normalizer_values, gate_max, weight_sum = load_state(
                partial_state, partial_normalizer, partial_stats, first, count, i_head, H, i_key, K, V, BK, BV, COMBINE_UNROLL
            )
        store_state(state, normalizer, stats, i_partial, i_key, K, V, values, normalizer_values, gate_max, weight_sum, BK, BV)
