"""Device functions of single elements: feature map, gates, and the hardware's fast exponential and reciprocal."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import triton
import triton.language as tl

from gbla_kernels.dispatch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fast_exp2(x):
    """``2^x`` to 2 ulp; subnormal results are flushed to zero, which saves three instructions an element."""
    if IS_INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_reciprocal(x):
    """``1 / x`` to 1 ulp."""
    if IS_INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def feature_map(x, RELU: tl.constexpr):
    """``relu``, or x + 1 above 0 and exp(x) below; never through expm1, which loses small values."""
    if RELU:
        return tl.maximum(x, 0.0)
    # exp(0) = 1 above 0, and 0 + exp(x) below: exact without a select
    return tl.maximum(x, 0.0) + fast_exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def feature_map_slope(x, RELU: tl.constexpr):
    """Derivative of the feature map."""
    if RELU:
        return tl.where(x > 0, 1.0, 0.0)
    return fast_exp2(tl.minimum(x, 0.0) * LOG2E)


@triton.jit
def sigmoid(x):
    """``1 / (1 + exp(-x))``."""
    return fast_reciprocal(1.0 + fast_exp2(-x * LOG2E))


@triton.jit
def inverse(weight_sum):
    """``1 / weight_sum``, and 0 for a row whose gates are all -inf."""
    return tl.where(weight_sum > 0, 1.0 / tl.where(weight_sum > 0, weight_sum, 1.0), 0.0)


@triton.jit
def round_once(x, DOT: tl.constexpr, IS_TRACED: tl.constexpr):
    """``x`` as a dot operand, computed once.

    The compiler computes a pure value again in each layout that a user wants, exponentials included; this one it converts. In a
    traced graph it stays pure: torch's analysis takes an impure instruction for a write to every input.
    """
    if IS_INTERPRETED or IS_TRACED or DOT != tl.bfloat16:
        return x.to(DOT)
    else:
        # not after an early return: that would be compiled too
        return tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], dtype=tl.bfloat16, is_pure=False, pack=2)


@triton.jit
def two_columns(x, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """``x (BLOCK,)`` as a dot operand ``(BLOCK, 16)`` whose columns add up to x: rounded, remainder, zeros.

    A product with it is a reduction on the tensor cores, without the shuffles and barriers of ``tl.sum``.
    """
    o_column = tl.arange(0, 16)[None, :]
    rounded = x.to(DOT).to(tl.float32)
    values = tl.where(o_column == 0, rounded[:, None], tl.where(o_column == 1, (x - rounded)[:, None], 0.0))
    return values.to(DOT)


@triton.jit
def one_column(BLOCK: tl.constexpr, DOT: tl.constexpr):
    """Ones and 15 columns of zeros, ``(BLOCK, 16)``: a dot with it sums rows."""
    values = tl.where(tl.arange(0, 16)[None, :] == 0, 1.0, 0.0) + tl.zeros([BLOCK, 16], tl.float32)
    return values.to(DOT)


@triton.jit
def remainder(x, rounded, DOT: tl.constexpr):
    """What rounding to a dot operand took away, as a second operand: two bf16 products give 16 bits of mantissa."""
    return (x - rounded.to(tl.float32)).to(DOT)
