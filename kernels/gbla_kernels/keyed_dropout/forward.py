"""The kernel: hashes, mask, scale and residual sum in one pass over a block of tokens and columns."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"

# L tokens, D width (docs/shapes.md)

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.dispatch import launch
from gbla_kernels.keyed_dropout.reference import INVERSE, MULTIPLIERS, threshold

BLOCK_TOKENS, BLOCK_HASHES = 16, 32
"""A program's tile: one hash serves four columns."""
INCREMENT, FIRST, SECOND = (tl.constexpr(multiplier) for multiplier in MULTIPLIERS)
BACK = tl.constexpr(INVERSE)


@triton.jit
def shifted(x, BITS: tl.constexpr):
    """Logical shift to the right of int64."""
    return (x.to(tl.uint64, bitcast=True) >> BITS).to(tl.int64, bitcast=True)


@triton.jit
def mix64(x):
    """As the reference's."""
    x = x + INCREMENT
    x = (x ^ shifted(x, 30)) * FIRST
    x = (x ^ shifted(x, 27)) * SECOND
    return x ^ shifted(x, 31)


@triton.jit(do_not_specialize=["num_tokens", "salt", "lowest"])
def keyed_dropout_kernel(
    x, residual, token_keys, out, num_tokens, stride_x, stride_residual, salt, lowest, scale,
    D: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BT: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Writes ``(L, D)``; strides are those of tokens."""
    # int64: a token times a stride passes 2^31
    o_token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    o_hash = tl.program_id(1) * BH + tl.arange(0, BH)
    o_column = tl.program_id(1) * (4 * BH) + tl.arange(0, 4 * BH)
    m_token = o_token < num_tokens
    mask = m_token[:, None] & (o_column < D)[None, :]
    b_key = tl.load(token_keys + o_token, mask=m_token, other=0)
    b_key = mix64(b_key + salt.to(tl.int64) * FIRST) * BACK
    b_bits = mix64((b_key[:, None] + o_hash.to(tl.int64)[None, :]) * SECOND)
    even = tl.join(b_bits.to(tl.int16), (b_bits >> 32).to(tl.int16))
    odd = tl.join((b_bits >> 16).to(tl.int16), (b_bits >> 48).to(tl.int16))
    b_draw = tl.reshape(tl.join(even, odd), (BT, 4 * BH))
    b_x = tl.load(x + o_token[:, None] * stride_x + o_column[None, :], mask=mask, other=0)
    # factor and product are rounded as the reference rounds them
    b_factor = tl.where(b_draw.to(tl.int32) >= lowest, scale, 0.0).to(b_x.dtype)
    b_out = (b_x.to(tl.float32) * b_factor.to(tl.float32)).to(b_x.dtype)
    if HAS_RESIDUAL:
        b_residual = tl.load(residual + o_token[:, None] * stride_residual + o_column[None, :], mask=mask, other=0)
        b_out = b_residual.to(tl.float32) + b_out.to(tl.float32)
    tl.store(out + o_token[:, None] * D + o_column[None, :], b_out.to(out.dtype.element_ty), mask=mask)


def keyed_dropout_forward(x: Tensor, token_keys: Tensor, probability: float, salt: int, residual: Tensor | None) -> Tensor:
    """Contiguous ``(L, D)`` in the dtype of ``residual + x``; the last dimension of both must be dense."""
    num_tokens, dim = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(residual.dtype, x.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    # one block more than needed at times: a grid is never empty
    grid = (num_tokens // BLOCK_TOKENS + 1, max(triton.cdiv(dim, 4 * BLOCK_HASHES), 1))
    launch(keyed_dropout_kernel, grid)(
        x,
        x if residual is None else residual,
        token_keys,
        out,
        num_tokens,
        x.stride(0),
        0 if residual is None else residual.stride(0),
        salt,
        threshold(probability),
        1 / (1 - probability),
        D=dim,
        HAS_RESIDUAL=residual is not None,
        BT=BLOCK_TOKENS,
        BH=BLOCK_HASHES,
        num_warps=4,
    )
    return out
