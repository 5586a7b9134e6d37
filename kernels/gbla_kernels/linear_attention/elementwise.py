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
def feature_map_and_slope(x, RELU: tl.constexpr):
    """The feature map and its derivative, which share an exponential."""
    slope = feature_map_slope(x, RELU)
    if RELU:
        return tl.maximum(x, 0.0), slope
    return tl.maximum(x, 0.0) + slope, slope


@triton.jit
def remainder(x, rounded, DOT: tl.constexpr):
    """What rounding to a dot operand took away, as a second operand: two bf16 products give 16 bits of mantissa."""
    return (x - rounded.to(tl.float32)).to(DOT)
