"""The gradients of a row's state and of norm_weight: the shares of splits, and their sums."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)
# FLA's dialect: i_ index, o_ offsets, m_ mask, p_ pointer, B? block; BK * NK >= K

import triton
import triton.language as tl

from gbla_kernels.linear_attention.elementwise import COMBINE_UNROLL, FEW_SPLITS
from gbla_kernels.linear_attention.norm_weight_gradient import add_shares


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


@triton.jit(do_not_specialize=["fold", "num_shares", "share_programs"])
def combine_gradients_kernel(
    partial_d_state,
    partial_d_normalizer,
    partial_brackets,
    slot_offsets,
    d_state,
    d_normalizer,
    brackets,
    shares,
    d_norm_weight,
    num_shares,
    share_programs,
    fold,
    H,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The sums of the shares of d norm_weight, then gradients dS and dn of rows of more than ``fold`` splits.

    A program has one such row, head and key block. Grid ``(share_programs + G * H * blocks of BK keys,)``;
    the first ones take ``COLUMNS`` of ``WIDTH = H V`` each.
    """
    i_program = tl.program_id(0) - share_programs
    if i_program < 0:
        add_shares(shares, d_norm_weight, num_shares, tl.program_id(0), WIDTH, ROWS, COLUMNS)
    else:
        KEY_BLOCKS: tl.constexpr = (K + BK - 1) // BK
        i_row = i_program // KEY_BLOCKS
        i_key = i_program % KEY_BLOCKS * BK
        first = tl.load(slot_offsets + i_row // H).to(tl.int32)
        count = tl.load(slot_offsets + i_row // H + 1).to(tl.int32) - first
        if (count > fold) | (count == 0):
            if count <= FEW_SPLITS:
                values, normalizer_values, bracket = load_state_gradient(
                    partial_d_state, partial_d_normalizer, partial_brackets, first, count, i_row % H, H, i_key, K, V, BK, BV, FEW_SPLITS
                )
            else:
                values, normalizer_values, bracket = load_state_gradient(
                    partial_d_state, partial_d_normalizer, partial_brackets, first, count, i_row % H, H, i_key, K, V, BK, BV, COMBINE_UNROLL
                )
            store_state_gradient(d_state, d_normalizer, brackets, i_row, i_key, K, V, values, normalizer_values, bracket, BK, BV)
