"""Rows of up to 64 tokens: products of tokens with tokens instead of a state, in one block of tokens.

Longer rows, up to 128 tokens, are those of ``short_rows``; what is longer still has states (``state``, ``output``). The README beside this
file has the formulas. With ``A = phi(q) (a phi(k))^T``, ``(T, T)``: ``u = A v`` and ``c = A 1``. That is less work than a state,
``(K, V)``, where T is small, and far fewer registers, so that many more rows run at once.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, T tokens of a row, H heads, K key width, V value width, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block

import triton
import triton.language as tl

from gbla_kernels.elementwise import LOG2E, fast_exp2, sigmoid
from gbla_kernels.linear_attention.elementwise import feature_map, inverse, remainder, round_to, weighted_feature_map
from gbla_kernels.linear_attention.output import normalized
from gbla_kernels.linear_attention.state import load_gate


@triton.jit
def product(x, y, DOT: tl.constexpr):
    """``x @ y`` of fp32 blocks; in bf16 both are taken as a rounded value and its remainder, 16 bits of mantissa."""
    x_high, y_high = round_to(x, DOT), round_to(y, DOT)
    result = tl.dot(x_high, y_high, input_precision="tf32x3")
    if DOT != tl.float32:
        result = tl.dot(remainder(x, x_high, DOT), y_high, acc=result)
        result = tl.dot(x_high, remainder(y, y_high, DOT), acc=result)
    return result


@triton.jit
def product_with_exact(x, y, DOT: tl.constexpr):
    """``x @ y`` where ``y`` is a dot operand already."""
    x_high = round_to(x, DOT)
    result = tl.dot(x_high, y, input_precision="tf32x3")
    if DOT != tl.float32:
        result = tl.dot(remainder(x, x_high, DOT), y, acc=result)
    return result


@triton.jit
def weigh_keys(
    p_key, p_gate, o_t, o_k, m_tk, num_tokens, stride_kt, stride_gt, HAS_GATE: tl.constexpr, RELU: tl.constexpr, DOT: tl.constexpr
):
    """Keys as loaded, ``a (BT,)`` and ``a phi(k) (BT, BK)``, zero past the end."""
    key = tl.load(p_key + o_t[:, None] * stride_kt + o_k[None, :], mask=m_tk, other=0.0).to(tl.float32)
    gate = load_gate(p_gate, o_t, num_tokens, stride_gt, HAS_GATE)
    gate_max = tl.max(gate)
    log_weight = (gate - tl.where(gate_max == float("-inf"), 0.0, gate_max)) * LOG2E
    weight = fast_exp2(log_weight)
    inverse_sum = inverse(tl.sum(weight))
    weighted = weighted_feature_map(key, weight[:, None], log_weight[:, None], RELU, DOT) * inverse_sum
    return key, weight * inverse_sum, tl.where(m_tk, weighted, 0.0)


@triton.jit
def tiny_row(
    p_query,
    p_key,
    p_value,
    p_gate,
    p_output_gate,
    p_norm_weight,
    p_out,
    num_tokens,
    stride_qt,
    stride_kt,
    stride_vt,
    stride_gt,
    stride_zt,
    stride_ot,
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
    """Outputs of one row and head; pointers at its first token."""
    o_t, o_k, o_v = tl.arange(0, BT), tl.arange(0, BK), tl.arange(0, BV)
    m_t, m_v = o_t < num_tokens, o_v < V
    m_tk, m_tv = m_t[:, None] & (o_k < K)[None, :], m_t[:, None] & m_v[None, :]
    query = tl.load(p_query + o_t[:, None] * stride_qt + o_k[None, :], mask=m_tk, other=0.0)
    value = tl.load(p_value + o_t[:, None] * stride_vt + o_v[None, :], mask=m_tv, other=0.0)
    if HAS_OUTPUT_GATE:
        z = tl.load(p_output_gate + o_t[:, None] * stride_zt + o_v[None, :], mask=m_tv, other=0.0)
    _, _, weighted = weigh_keys(p_key, p_gate, o_t, o_k, m_tk, num_tokens, stride_kt, stride_gt, HAS_GATE, RELU, DOT)
    phi = round_to(feature_map(query.to(tl.float32), RELU), DOT)
    scores = tl.dot(phi, tl.trans(round_to(weighted, DOT)), input_precision="tf32x3")
    u = product_with_exact(scores, value.to(tl.float32).to(DOT), DOT)
    y = u * normalized(u, tl.sum(scores, axis=1), eps, V, NORMALIZE, HAS_NORM)[:, None]
    if HAS_NORM:
        y = y * tl.load(p_norm_weight + o_v, mask=m_v, other=0.0).to(tl.float32)[None, :]
    if HAS_OUTPUT_GATE:
        z = z.to(tl.float32)
        y = y * (z * sigmoid(z))
    tl.store(p_out + o_t[:, None] * stride_ot + o_v[None, :], y.to(p_out.dtype.element_ty), mask=m_tv)


@triton.jit
def tiny_row_kernel(
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
    """One row of ``LONGER_THAN < T <= BT`` tokens and head; others are left to other launches; grid ``(S * H,)``."""
    i_program = tl.program_id(0)
    i_head = (i_program % H).to(tl.int64)
    start = tl.load(short_rows + 2 * (i_program // H))
    num_tokens = (tl.load(short_rows + 2 * (i_program // H) + 1) - start).to(tl.int32)
    if (num_tokens > LONGER_THAN) & (num_tokens <= BT):
        tiny_row(
            query + start * stride_qt + i_head * stride_qh,
            key + start * stride_kt + i_head * stride_kh,
            value + start * stride_vt + i_head * stride_vh,
            key_gate + start * stride_gt + i_head * stride_gh,
            output_gate + start * stride_zt + i_head * stride_zh,
            norm_weight + i_head * V,
            out + start * stride_ot + i_head * stride_oh,
            num_tokens,
            stride_qt,
            stride_kt,
            stride_vt,
            stride_gt,
            stride_zt,
            stride_ot,
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
