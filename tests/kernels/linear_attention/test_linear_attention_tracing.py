"""Without a GPU the compiler can still trace the kernels for one: forward and backward, every size symbolic, no input written."""

import os
import subprocess
import sys

import pytest

from gbla_kernels.dispatch import INTERPRETED

# a process of its own: this one interprets kernels, so the compiler cannot see them
TRACE = """
import torch
import triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget

from gbla_kernels.linear_attention.autograd import attend
from gbla_kernels.row_splits import RowSplits
from gbla_kernels.testing.inputs import attention_inputs


class HopperWithoutDevice:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Traced(Exception):
    pass


def refuse_to_run(graph, inputs):
    def run(*args):
        raise Traced

    return run


triton.runtime.driver.set_active(HopperWithoutDevice())
inputs, layout = attention_inputs([5, 1495, 1400, 100], num_heads=2, key_dim=64, value_dim=64, dtype=torch.bfloat16)


def op(short_rows, splits, slot_offsets, **tensors):
    table = RowSplits(short_rows, splits, slot_offsets, True, True)
    return attend(**tensors, splits=table, feature_map="elu1", normalize=True, eps=1e-6)


compiled = torch.compile(op, backend=aot_autograd(fw_compiler=refuse_to_run), fullgraph=True, dynamic=True)
try:
    compiled(*layout.row_splits.tensors(), **inputs)
except Traced:
    print("traced")
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_linear_attention_compile_gpu.py compiles and runs")
def test_compiler_traces_forward_and_backward_without_writing_to_inputs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=150)
    assert finished.returncode == 0 and "traced" in finished.stdout, finished.stderr[-4000:]
