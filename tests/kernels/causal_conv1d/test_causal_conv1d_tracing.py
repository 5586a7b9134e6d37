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

from gbla_kernels import Backend, causal_conv1d, rms_norm_causal_conv1d
from gbla_kernels.causal_conv1d import api
from gbla_kernels.rms_norm_causal_conv1d import api as norm_api
from gbla_kernels.testing.conv_laws import ConvSubject

WRITTEN = {"y", "rstd", "dx", "partials", "d_weight", "d_bias", "d_norm_weight"}


class HopperWithoutDevice:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Traced(Exception):
    pass


def refuse_to_run(graph, inputs):
    launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    assert launches and all(set(kwargs["tensors_to_clone"]) <= WRITTEN for kwargs in launches), launches
    graphs.append(len(launches))

    def run(*args):
        raise Traced

    return run


triton.runtime.driver.set_active(HopperWithoutDevice())
# the inputs are on the CPU, where these would refuse or read them
api.require_triton_device = norm_api.require_triton_device = lambda *arguments: None
api.require_offsets = lambda *arguments: None
for op, has_norm in ((causal_conv1d, False), (rms_norm_causal_conv1d, True)):
    for has_layout in (True, False):
        graphs = []
        torch._dynamo.reset()
        subject = ConvSubject(op=op, has_norm=has_norm, backend=Backend.TRITON, dtype=torch.bfloat16, parameter_dtype=torch.float32)

        def call(tensors, offsets, layout):
            return op(**tensors, offsets=offsets, layout=layout, backend=Backend.TRITON) * 2

        compiled = torch.compile(call, backend=aot_autograd(fw_compiler=refuse_to_run), fullgraph=True, dynamic=True)
        for lengths in ([5, 1495, 1400, 9, 1, 1], [70, 2000, 0, 900, 64, 0, 0, 3, 3], [2, 3]):
            tensors, layout = subject.inputs(lengths, 0)
            try:
                compiled(tensors, layout.offsets, layout if has_layout else None)
            except Traced:
                pass
        print(graphs)
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_causal_conv1d_gpu.py compiles and runs")
def test_compiler_traces_forward_and_backward_without_writing_to_inputs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    finished = subprocess.run([sys.executable, "-c", TRACE], env=environment, capture_output=True, text=True, timeout=150)
    assert finished.returncode == 0, finished.stderr[-4000:]
    # one launch in the forward, two in the backward
    assert finished.stdout.split("\n")[:4] == ["[1, 2]"] * 4, finished.stdout
