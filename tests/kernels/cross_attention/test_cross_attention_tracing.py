"""Without a GPU the compiler can still trace the kernels for one: once for all batches, and no input is written."""

from collections.abc import Callable

import pytest

from gbla_kernels.dispatch import INTERPRETED

TRACE = """
import torch

from gbla_kernels import Backend, jagged_cross_attention
from gbla_kernels.cross_attention import api
from gbla_kernels.testing.cross_attention_inputs import CrossAttention
from gbla_kernels.testing.tracing import pretend_hopper, trace

WRITTEN = {"out", "lse", "partial_out", "partial_stats", "d_query", "d_key", "d_value", "partial_d_query"}
# more queries than the backward's small tile, more keys than one part: one choice of kernels
BATCHES = ([(3, 7), (0, 4), (2, 0), (70, 1500)], [(80, 2048), (0, 0), (20, 77)], [(2, 5), (100, 9000), (1, 1), (0, 3), (9, 70)])


def op(query, key, value, queries, keys):
    return jagged_cross_attention(query, key, value, queries, keys, backend=Backend.TRITON) * 2


pretend_hopper(api)
for dtype, width in ((torch.float32, 256), (torch.bfloat16, 64)):
    subject = CrossAttention(backend=Backend.TRITON, dtype=dtype, key_dim=width, value_dim=width)
    calls = []
    for rows in BATCHES:
        tensors = {name: tensor.requires_grad_() for name, tensor in subject.inputs(rows).items()}
        queries, keys = subject.layouts(rows)
        calls.append({**tensors, "queries": queries, "keys": keys})
    count, written = trace(op, calls)
    assert count == 1, count
    assert len(written) == 2 and all(names <= WRITTEN for launches in written for names in launches), written
print("traced")
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_cross_attention_gpu.py compiles and runs")
def test_compiler_traces_all_batches_once_and_writes_no_input(run_without_interpreter: Callable[[str], str]) -> None:
    assert run_without_interpreter(TRACE) == "traced\n"
