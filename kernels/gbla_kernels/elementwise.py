"""What the kernels of several ops compute alike: the hardware's fast exponential and reciprocal, the sigmoid, the type of dots."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from typing import Any

import torch
import triton
import triton.language as tl

from gbla_kernels.dispatch import INTERPRETED

IS_INTERPRETED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
"""Exponentials are taken in base 2."""


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
def sigmoid(x):
    """``1 / (1 + exp(-x))`` without overflow: exp gives inf, and its inverse 0."""
    return fast_reciprocal(1.0 + fast_exp2(x * -LOG2E))


def dot_type(dtype: torch.dtype) -> Any:
    """Operands of dots: bf16 stays; the gradients of fp16 leave its range, and the interpreter's bf16 arithmetic is wrong."""
    return tl.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else tl.float32
