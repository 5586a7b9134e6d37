"""Short rows but for the tiniest: from inputs to outputs, and from the output's gradient to all gradients, without a state in memory."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.linear_attention.elementwise import inverse, remainder
from gbla_kernels.linear_attention.key_backward import key_backward
from gbla_kernels.linear_attention.output import emit_output
from gbla_kernels.linear_attention.query_backward import centred_state, query_backward, state_centre
from gbla_kernels.linear_attention.state import accumulate_state


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
    LONGER_THAN: tl.constexpr,
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
    """One row of ``T > LONGER_THAN`` tokens and head, its state never in memory; others are left to other launches; grid ``(S * H,)``."""
    i_program = tl.program_id(0)
    i_head = (i_program % H).to(tl.int64)
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    num_tokens = tl.where(num_tokens > LONGER_THAN, num_tokens, 0)
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
        False,
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
        False,
    )


@triton.jit(do_not_specialize=["first_share"])
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
    first_share,
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
    LONGER_THAN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OUTPUT_GATE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    RELU: tl.constexpr,
    DOT: tl.constexpr,
    IS_PURE: tl.constexpr,
):
    """All gradients of one row of ``T > LONGER_THAN`` tokens and head; grid ``(S * H,)``.

    Its share of d norm_weight is written per row, and zeros for an empty row.
    """
    i_program = tl.program_id(0)
    i_head = (i_program % H).to(tl.int64)
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    is_own = (num_tokens > LONGER_THAN) | (num_tokens == 0)
    num_tokens = tl.where(is_own, num_tokens, 0)
    p_key = key + start * stride_kt + i_head * stride_kh
    p_value = value + start * stride_vt + i_head * stride_vh
    p_gate = key_gate + start * stride_gt + i_head * stride_gh
    state, normalizer, gate_max, weight_sum = accumulate_state(
        p_key, p_value, p_gate, num_tokens, stride_kt, stride_vt, stride_gt, 0, K, V, BT, BK, 1, BV, HAS_GATE, RELU, DOT, True
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
        IS_PURE,
    )
    if HAS_NORM:
        o_v = tl.arange(0, BV)
        i_share = i_program.to(tl.int64) + first_share * H
        tl.store(d_norm_weight + i_share * V + o_v, weight_values, mask=(o_v < V) & is_own)
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
