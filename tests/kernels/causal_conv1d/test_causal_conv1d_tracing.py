"""Without a GPU the compiler can still trace the kernels for one: once for all batches, and no input is written."""

from collections.abc import Callable

import pytest

from gbla_kernels.dispatch import INTERPRETED

TRACE = """
import torch

from gbla_kernels import Backend, causal_conv1d, rms_norm_causal_conv1d
from gbla_kernels.causal_conv1d import api
from gbla_kernels.rms_norm_causal_conv1d import api as norm_api
from gbla_kernels.testing.conv_laws import ConvSubject
from gbla_kernels.testing.tracing import pretend_hopper, trace

WRITTEN = [[{"y", "rstd"}], [{"dx", "partials"}, {"d_weight", "d_bias", "d_norm_weight"}]]
BATCHES = ([5, 1495, 1400, 9, 1, 1], [70, 2000, 0, 900, 64, 0, 0, 3, 3], [2, 3])

pretend_hopper(api, norm_api)
for op, has_norm in ((causal_conv1d, False), (rms_norm_causal_conv1d, True)):
    subject = ConvSubject(op=op, has_norm=has_norm, backend=Backend.TRITON, dtype=torch.bfloat16, parameter_dtype=torch.float32)
    for has_layout in (True, False):

        def call(tensors, offsets, layout):
            return op(**tensors, offsets=offsets, layout=layout, backend=Backend.TRITON) * 2

        calls = []
        for lengths in BATCHES:
            tensors, layout = subject.inputs(lengths, 0)
            calls.append({"tensors": tensors, "offsets": layout.offsets, "layout": layout if has_layout else None})
        count, written = trace(call, calls)
        assert count == 1, count
        # without the norm its arguments are not there
        expected = WRITTEN if has_norm else [[names - {"rstd", "d_norm_weight"} for names in launches] for launches in WRITTEN]
        assert written == expected, written
print("traced")
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_causal_conv1d_gpu.py compiles and runs")
def test_compiler_traces_all_batches_once_and_writes_no_input(run_without_interpreter: Callable[[str], str]) -> None:
    assert run_without_interpreter(TRACE) == "traced\n"
