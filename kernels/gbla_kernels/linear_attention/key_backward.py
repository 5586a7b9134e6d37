"""Backward, key side: dk, dv and dg from the gradient of the state; the weights are computed again."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.elementwise import LOG2E, fast_exp2
from gbla_kernels.linear_attention.elementwise import (
    feature_map,
    feature_map_slope,
    inverse,
    keep_operand,
    product_with_zeros,
    remainder,
)
from gbla_kernels.linear_attention.state import finite, load_gate, splits_of_row
from gbla_kernels.linear_attention.state_gradient import load_state_gradient


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
    safe_max = finite(gate_max)
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
        products = tl.zeros([BT, 16], tl.float32)
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
            key = tl.load(p_key + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0)
            own_weight = weight
            if BT >= 64 and DOT == tl.bfloat16:
                products = product_with_zeros(key, products, DOT)
                if not HAS_GATE:
                    own_weight = keep_operand(weight, tl.sum(products, axis=1))
            key = key.to(tl.float32)
            phi = feature_map(key, RELU)
            d_value = tl.dot((phi * weight[:, None]).to(DOT), slice_d_state, acc=d_value, input_precision="tf32x3")
            # padded keys: d_state and d_normalizer are zero there
            d_phi = tl.dot(value, tl.trans(slice_d_state), input_precision="tf32x3")
            if DOT != tl.float32:
                # added by hand: a product that starts from another one would not be split over the columns where warps are eight
                d_phi += keep_operand(tl.dot(value, tl.trans(slice_rest)), d_phi)
            d_phi += slice_d_normalizer[None, :]
            d_weight += tl.sum(phi * d_phi, axis=1)
            d_key = own_weight[:, None] * d_phi * feature_map_slope(key, RELU)
            p_dk = p_d_key + o_t[:, None] * stride_dkt + o_k[None, :]
            tl.store(p_dk, d_key.to(p_d_key.dtype.element_ty), mask=m_tk)
        if BT >= 64 and DOT == tl.bfloat16:
            d_weight = keep_operand(d_weight, tl.sum(products, axis=1))
        p_dv = p_d_value + o_t[:, None] * stride_dvt + o_v[None, :]
        tl.store(p_dv, d_value.to(p_d_value.dtype.element_ty), mask=m_tv)
        if HAS_GATE:
            d_gate = weight * (d_weight - bracket)
            tl.store(p_d_gate + o_t * stride_dgt, d_gate.to(p_d_gate.dtype.element_ty), mask=m_t)


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
    """Key side of a piece of one split and head; grid ``(Z * H * pieces,)``.

    The shares of dS of a row of at most ``fold`` splits are added here.
    """
    i_piece = tl.program_id(0) % pieces
    i_partial = tl.program_id(0) // pieces
    i_head = (i_partial % H).to(tl.int64)
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
        first, count = splits_of_row(slot_offsets, i_slot, fold)
        if count <= fold:
            # a piece past the end of its split has nothing to do
            count = tl.where(num_tokens > 0, count, 0)
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
