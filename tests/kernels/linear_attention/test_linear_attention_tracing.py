"""Without a GPU the compiler can still trace the kernels for one: once for all batches, and no input is written."""

from collections.abc import Callable

import pytest

from gbla_kernels.dispatch import INTERPRETED

TRACE = """
import torch

from gbla_kernels import Backend, gated_linear_attention
from gbla_kernels.linear_attention import api
from gbla_kernels.testing.inputs import attention_inputs
from gbla_kernels.testing.tracing import pretend_hopper, trace

READ = {"query", "key", "value", "key_gate", "output_gate", "norm_weight", "short_rows", "splits", "slot_offsets"}
# two short rows beside two heads: equal sizes that differ in the next batch
BATCHES = ([5, 1495, 1400, 100], [70, 2000, 0, 900, 257, 64, 1], [3, 4, 4000, 600, 5])


def op(offsets, layout, **tensors):
    return gated_linear_attention(**tensors, offsets=offsets, layout=layout, backend=Backend.TRITON) * 2


pretend_hopper(api)
for has_layout in (True, False):
    calls = []
    for lengths in BATCHES:
        tensors, layout = attention_inputs(lengths, num_heads=2, key_dim=64, value_dim=64, dtype=torch.bfloat16)
        calls.append({**tensors, "offsets": layout.offsets, "layout": layout if has_layout else None})
    count, written = trace(op, calls)
    assert count == 1, count
    assert len(written) == 2 and not any(names & READ for launches in written for names in launches), written
print("traced")
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_linear_attention_compile_gpu.py compiles and runs")
def test_compiler_traces_all_batches_once_and_writes_no_input(run_without_interpreter: Callable[[str], str]) -> None:
    assert run_without_interpreter(TRACE) == "traced\n"
