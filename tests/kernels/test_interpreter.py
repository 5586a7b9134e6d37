"""What ``tests/conftest.py`` leaves out of Triton's interpreter must not be missed."""

import pytest
import torch
import triton
import triton.language as tl

from gbla_kernels.dispatch import INTERPRETED

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")


@triton.jit
def double(x):
    return x * 2


@triton.jit
def double_kernel(p):
    tl.store(p, double(tl.load(p)))


def test_kernels_run_after_a_device_function_was_called_outside_of_one() -> None:
    assert double(3) == 6
    for _ in range(2):
        x = torch.ones(1)
        double_kernel[(1,)](x)
        assert x.item() == 2
