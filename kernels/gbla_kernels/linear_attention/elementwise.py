"""Device functions of the kernels: the feature map, rounding to dot operands, and sums by products with ones."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.elementwise import IS_INTERPRETED, LOG2E, fast_exp2

FEW_SPLITS = tl.constexpr(2 if INTERPRETED else 4)
"""A row of up to so many partial states loads so many at once, not ``COMBINE_UNROLL``: loads that are masked out cost time, too."""
COMBINE_UNROLL = tl.constexpr(2 if INTERPRETED else 32)
"""Partial states that a program loads at once where it adds up those of a row: half of the most splits."""


@triton.jit
def feature_map(x, RELU: tl.constexpr):
    """``relu``, or x + 1 above 0 and exp(x) below; never through expm1, which loses small values."""
    if RELU:
        return tl.maximum(x, 0.0)
    # exp(0) = 1 above 0, and 0 + exp(x) below: exact without a select
    return tl.maximum(x, 0.0) + fast_exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def weighted_feature_map(x, weight, log_weight, RELU: tl.constexpr, DOT: tl.constexpr):
    """``feature_map(x) * weight``, where ``weight = 2^log_weight``.

    In half precision with the logarithm inside the exponential, which saves two instructions an element; it is less exact by the
    rounding of the sum.
    """
    if RELU or DOT == tl.float32:
        return feature_map(x, RELU) * weight
    return tl.maximum(x, 0.0) * weight + fast_exp2(tl.minimum(x, 0.0) * LOG2E + log_weight)


@triton.jit
def feature_map_slope(x, RELU: tl.constexpr):
    """Derivative of the feature map."""
    if RELU:
        return tl.where(x > 0, 1.0, 0.0)
    return fast_exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def inverse(weight_sum):
    """``1 / weight_sum``, and 0 for a row whose gates are all -inf."""
    return tl.where(weight_sum > 0, 1.0 / tl.where(weight_sum > 0, weight_sum, 1.0), 0.0)


@triton.jit
def round_to(x, DOT: tl.constexpr):
    """``x`` as a dot operand. In bf16 two values at once: single conversions run on the slow unit of the exponentials."""
    if IS_INTERPRETED or DOT != tl.bfloat16:
        return x.to(DOT)
    else:
        # not after an early return: that would be compiled too
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def dot_rows(BT: tl.constexpr, COLUMNS: tl.constexpr, DOT: tl.constexpr):
    """Zeros ``(BT,)`` in the layout that rows of a dot's result have; for ``round_like``."""
    operand = tl.zeros([BT, 16], DOT)
    return tl.sum(tl.dot(operand, tl.zeros([16, COLUMNS], DOT)), axis=1)


@triton.jit
def round_like(x, rows, DOT: tl.constexpr, IS_PURE: tl.constexpr):
    """``x (BT, columns)`` as a dot operand, made once, in the layout of a dot's result.

    Left to itself the compiler computes a value that is both a dot operand and combined with a dot's result in up to three layouts,
    exponentials included. ``rows (BT,)`` has the layout of the result's rows; it does not enter the value. In a traced graph the
    instruction is pure, and repeated: torch's analysis takes an impure one for a write to every input. So it is on other GPUs than Hopper,
    where Triton does not know how to pipeline an impure one.
    """
    if IS_INTERPRETED or DOT != tl.bfloat16:
        return x.to(DOT)
    else:
        # not after an early return: that would be compiled too
        anchor = tl.broadcast_to(rows[:, None], x.shape)
        return tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r,r,r", [x, anchor], dtype=tl.bfloat16, is_pure=IS_PURE, pack=2
        )


@triton.jit
def two_columns(x, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """``x (BLOCK,)`` as a dot operand ``(BLOCK, 8)`` whose columns add up to x: rounded, remainder, zeros.

    A product with it is a reduction on the tensor cores, without the shuffles and barriers of ``tl.sum``.
    """
    o_column = tl.arange(0, 8)[None, :]
    rounded = x.to(DOT).to(tl.float32)
    values = tl.where(o_column == 0, rounded[:, None], tl.where(o_column == 1, (x - rounded)[:, None], 0.0))
    return values.to(DOT)


@triton.jit
def add_rows(total, x, BT: tl.constexpr, DOT: tl.constexpr):
    """``total (columns, 16)`` with the rows of ``x (BT, columns)`` added to its first column.

    A product with ones: 8 registers of a thread hold the sums of 64 columns, without the shuffles and barriers of ``tl.sum``.
    """
    ones = tl.where(tl.arange(0, 16)[None, :] == 0, 1.0, 0.0) + tl.zeros([BT, 16], tl.float32)
    return tl.dot(tl.trans(round_to(x, DOT)), ones.to(DOT), acc=total, input_precision="tf32x3")


@triton.jit
def product_with_zeros(tile, total, DOT: tl.constexpr):
    """``total (rows, few)`` plus ``tile (rows, columns) @ 0``; for ``keep_operand``. Only a tile in the type of dot operands takes part."""
    if tile.dtype == DOT:
        return tl.dot(tile, tl.zeros([tile.shape[1], total.shape[1]], DOT), acc=total)
    else:
        return total


@triton.jit
def keep_operand(x, products):
    """``x``, whatever ``products`` of the same shape are.

    A tile that asynchronous copies bring lies swizzled in shared memory only if a tensor core reads it there. Else whatever reads it in
    the layout of a dot's result, where eight rows of a warp meet in the same banks, takes eight times as long. So such a tile is multiplied
    by zeros, which costs next to nothing; the result must be used, and is not: not even its NaN where the tile has infinities.
    """
    if IS_INTERPRETED:
        return x
    else:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r", [x, products], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def remainder(x, rounded, DOT: tl.constexpr):
    """What rounding to a dot operand took away, as a second operand: two bf16 products give 16 bits of mantissa."""
    return round_to(x - rounded.to(tl.float32), DOT)


@triton.jit
def two_rows(x, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """``two_columns(x)`` transposed, with more zeros: ``(16, BLOCK)``.

    For ``x`` that lies as the rows of a dot's result do: with ``two_columns``, Triton 3.6 gave wrong sums or an illegal access at K = 64.
    """
    o_row = tl.arange(0, 16)[:, None]
    rounded = x.to(DOT).to(tl.float32)
    values = tl.where(o_row == 0, rounded[None, :], tl.where(o_row == 1, (x - rounded)[None, :], 0.0))
    return values.to(DOT)


@triton.jit
def outer_column(x, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """``x (BLOCK,)`` as a dot operand ``(BLOCK, 16)`` whose product with ``outer_row(y)`` is the outer product ``x y^T``, to 16 bits.

    Columns: rounded, remainder, rounded, zeros; what the product leaves out is one remainder times the other.
    """
    o_column = tl.arange(0, 16)[None, :]
    rounded = x.to(DOT).to(tl.float32)
    values = tl.where((o_column == 0) | (o_column == 2), rounded[:, None], tl.where(o_column == 1, (x - rounded)[:, None], 0.0))
    return values.to(DOT)


@triton.jit
def outer_row(y, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """``y (BLOCK,)`` as a dot operand ``(16, BLOCK)``, for ``outer_column``: rounded, rounded, remainder, zeros."""
    o_row = tl.arange(0, 16)[:, None]
    rounded = y.to(DOT).to(tl.float32)
    values = tl.where(o_row < 2, rounded[None, :], tl.where(o_row == 2, (y - rounded)[None, :], 0.0))
    return values.to(DOT)
