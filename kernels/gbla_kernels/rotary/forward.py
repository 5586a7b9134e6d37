"""The kernel: one program turns some heads of a block of tokens, whose sines and cosines it computes once."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

# L tokens, H heads, K head width (docs/shapes.md)

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.dispatch import Launcher

TILE_ELEMENTS = 1024
"""Pairs of one head that a program turns at once: 16 bytes of bf16 for each thread and half."""
HEADS_PER_PROGRAM = 8
"""Heads that share the sines of a program; more would leave too few programs for short batches."""


@triton.jit(do_not_specialize=["num_tokens"])
def rotary_kernel(
    query, key, positions, query_out, key_out, num_tokens, stride_qt, stride_qh, stride_kt, stride_kh,
    H: tl.constexpr, HALF: tl.constexpr, LOG2_BASE: tl.constexpr, INVERSE: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes ``(L, H, 2 HALF)`` tensors; strides are those of tokens and heads."""
    # int64: a token times a stride passes 2^31
    o_token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_pair = tl.arange(0, BLOCK)
    m_token = o_token < num_tokens
    mask = m_token[:, None] & (o_pair < HALF)[None, :]
    b_position = tl.load(positions + o_token, mask=m_token, other=0).to(tl.float64)
    # whole turns are dropped in fp64: an fp32 angle is up to 0.01 off at position 131072
    exponent = o_pair.to(tl.float64) * (-LOG2_BASE / HALF)
    turns = b_position[:, None] * (tl.exp2(exponent) * 0.15915494309189535)[None, :]
    angle = ((turns - tl.floor(turns + 0.5)) * 6.283185307179586).to(tl.float32)
    b_cos = tl.cos(angle)
    b_sin = tl.sin(angle)
    if INVERSE:
        b_sin = -b_sin
    for i in tl.static_range(BH):
        i_head = (tl.program_id(1) * BH + i).to(tl.int64)
        m_head = mask & (i_head < H)
        p_query = query + o_token[:, None] * stride_qt + i_head * stride_qh + o_pair[None, :]
        p_key = key + o_token[:, None] * stride_kt + i_head * stride_kh + o_pair[None, :]
        o_out = (o_token[:, None] * H + i_head) * (2 * HALF) + o_pair[None, :]
        b_first = tl.load(p_query, mask=m_head, other=0).to(tl.float32)
        b_second = tl.load(p_query + HALF, mask=m_head, other=0).to(tl.float32)
        tl.store(query_out + o_out, (b_first * b_cos - b_second * b_sin).to(query_out.dtype.element_ty), mask=m_head)
        tl.store(query_out + o_out + HALF, (b_second * b_cos + b_first * b_sin).to(query_out.dtype.element_ty), mask=m_head)
        b_first = tl.load(p_key, mask=m_head, other=0).to(tl.float32)
        b_second = tl.load(p_key + HALF, mask=m_head, other=0).to(tl.float32)
        tl.store(key_out + o_out, (b_first * b_cos - b_second * b_sin).to(key_out.dtype.element_ty), mask=m_head)
        tl.store(key_out + o_out + HALF, (b_second * b_cos + b_first * b_sin).to(key_out.dtype.element_ty), mask=m_head)


def rotary_forward(query: Tensor, key: Tensor, positions: Tensor, base: float, inverse: bool, launcher: Launcher) -> tuple[Tensor, Tensor]:
    """Contiguous ``(L, H, K)`` in the dtypes of query and key, whose last dimension must be dense."""
    num_tokens = query.shape[0]
    # a compiler may have made them symbolic; the kernel is specialised on them
    num_heads, head_dim = int(query.shape[1]), int(query.shape[2])
    query_out, key_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key))
    block = triton.next_power_of_2(head_dim // 2)
    block_tokens = max(TILE_ELEMENTS // block, 1)
    heads = min(num_heads, HEADS_PER_PROGRAM)
    # one block more than needed at times: a grid is never empty
    launcher(rotary_kernel, (num_tokens // block_tokens + 1, triton.cdiv(num_heads, heads)))(
        query,
        key,
        positions,
        query_out,
        key_out,
        num_tokens,
        query.stride(0),
        query.stride(1),
        key.stride(0),
        key.stride(1),
        H=num_heads,
        HALF=head_dim // 2,
        LOG2_BASE=math.log2(base),
        INVERSE=inverse,
        BT=block_tokens,
        BH=heads,
        BLOCK=block,
        num_warps=4,
    )
    return query_out, key_out
