"""Rows of few tokens, backward: all gradients of a row and head in one block of tokens, as in ``tiny_rows``."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, T tokens of a row, H heads, K key width, V value width, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block

import triton
import triton.language as tl

from gbla_kernels.linear_attention.elementwise import feature_map, feature_map_slope, round_to
from gbla_kernels.linear_attention.output_gradient import output_gradient
from gbla_kernels.linear_attention.tiny_rows import product, product_with_exact, weigh_keys


@triton.jit
def tiny_row_backward(
    p_query,
    p_key,
    p_value,
    p_gate,
    p_output_gate,
    p_norm_weight,
    p_d_out,
    p_d_query,
    p_d_key,
    p_d_value,
    p_d_gate,
    p_d_output_gate,
    p_d_norm_weight,
    num_tokens,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_zt,
    stride_ot,
    stride_dqt,
    stride_dkt,
    stride_dvt,
    stride_dgt,
    stride_dzt,
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
    """Writes all gradients of one row and head; pointers at its first token."""
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_t, m_v = o_t < num_tokens, o_v < V
    m_tk, m_tv = m_t[:, None] & (o_k < K)[None, :], m_t[:, None] & m_v[None, :]
    query = tl.load(p_query + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
    value = tl.load(p_value + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32).to(DOT)
    d_y = tl.load(p_d_out + o_t[:, None] * stride_ot + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
    z = d_y
    if HAS_OUTPUT_GATE:
        z = tl.load(p_output_gate + o_t[:, None] * stride_zt + o_v[None, :], mask=m_tv, other=0.0).to(tl.float32)
    key, weight, weighted = weigh_keys(p_key, p_gate, o_t, o_k, m_tk, num_tokens, stride_kt, stride_gt, HAS_GATE, RELU, DOT)
    phi = round_to(feature_map(query, RELU), DOT)
    scores = tl.trans(product_with_exact(weighted, tl.trans(phi), DOT))
    u = product_with_exact(scores, value, DOT)
    norm_weight = tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32) if HAS_NORM else 0.0
    p_dz = p_d_output_gate + o_t[:, None] * stride_dzt + o_v[None, :]
    d_u, d_c, weight_share = output_gradient(
        *(u, tl.sum(scores, axis=1), d_y, z, norm_weight, p_dz, m_tv, eps, V, HAS_OUTPUT_GATE, HAS_NORM, NORMALIZE)
    )
    if HAS_NORM:
        tl.store(p_d_norm_weight + o_v, tl.sum(weight_share, axis=0), mask=m_v)
    # columns past the end meet keys that are zero
    d_scores = product_with_exact(d_u, tl.trans(value), DOT) + d_c[:, None]
    d_query = product(d_scores, weighted, DOT) * feature_map_slope(query, RELU)
    tl.store(p_d_query + o_t[:, None] * stride_dqt + o_k[None, :], d_query.to(p_d_query.dtype.element_ty), mask=m_tk)
    d_value = product(tl.trans(scores), d_u, DOT)
    tl.store(p_d_value + o_t[:, None] * stride_dvt + o_v[None, :], d_value.to(p_d_value.dtype.element_ty), mask=m_tv)
    d_weighted = product_with_exact(tl.trans(d_scores), phi, DOT)
    d_key = d_weighted * weight[:, None] * feature_map_slope(key, RELU)
    tl.store(p_d_key + o_t[:, None] * stride_dkt + o_k[None, :], d_key.to(p_d_key.dtype.element_ty), mask=m_tk)
    if HAS_GATE:
        # a_t da_t, whose sum is the bracket <S, dS> + <n, dn>
        along = tl.sum(weighted * d_weighted, axis=1)
        d_gate = along - weight * tl.sum(along)
        tl.store(p_d_gate + o_t * stride_dgt, d_gate.to(p_d_gate.dtype.element_ty), mask=m_t)


@triton.jit(do_not_specialize=["first_share"])
def tiny_row_backward_kernel(
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
):
    """One row of ``LONGER_THAN < T <= BT`` tokens and head; grid ``(S * H,)``; its share of d norm_weight is written per row."""
    i_program = tl.program_id(0)
    i_head = (i_program % H).to(tl.int64)
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    i_share = i_program.to(tl.int64) + first_share * H
    if (num_tokens > LONGER_THAN) & (num_tokens <= BT):
        tiny_row_backward(
            query + start * stride_qt + i_head * stride_qh,
            key + start * stride_kt + i_head * stride_kh,
            value + start * stride_vt + i_head * stride_vh,
            key_gate + start * stride_gt + i_head * stride_gh,
            output_gate + start * stride_zt + i_head * stride_zh,
            norm_weight + i_head * V,
            d_out + start * stride_ot + i_head * stride_oh,
            d_query + start * stride_dqt + i_head * stride_dqh,
            d_key + start * stride_dkt + i_head * stride_dkh,
            d_value + start * stride_dvt + i_head * stride_dvh,
            d_key_gate + start * stride_dgt + i_head * stride_dgh,
            d_output_gate + start * stride_dzt + i_head * stride_dzh,
            d_norm_weight + i_share * V,
            num_tokens,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_gt,
            stride_zt,
            stride_ot,
            stride_dqt,
            stride_dkt,
            stride_dvt,
            stride_dgt,
            stride_dzt,
            eps,
            K,
            V,
            BT,
            BK,
            BV,
            HAS_GATE,
            HAS_OUTPUT_GATE,
            HAS_NORM,
            NORMALIZE,
            RELU,
            DOT,
        )
