"""Without a GPU the compiler can still trace the kernel for one: once for all batches, and no input is written."""

from collections.abc import Callable

import pytest

from gbla_kernels.dispatch import INTERPRETED

TRACE = """
import torch

from gbla_kernels import Backend, rotary_embedding
from gbla_kernels.rotary import api
from gbla_kernels.testing.tracing import pretend_hopper, trace


def op(query, key, positions):
    query, key = rotary_embedding(query, key, positions, backend=Backend.TRITON)
    return query * key


pretend_hopper(api)
calls = []
for num_tokens in (64, 65, 1000):
    query, key = torch.randn(num_tokens, 3, 4, 32, dtype=torch.bfloat16).requires_grad_().unbind(1)[:2]
    calls.append({"query": query, "key": key, "positions": torch.arange(num_tokens)})
count, written = trace(op, calls)
# two if the base were a default argument: a float that is first taken for an input
assert count == 1, count
assert written == [[{"query_out", "key_out"}], [{"query_out", "key_out"}]], written
print("traced")
"""


@pytest.mark.skipif(not INTERPRETED, reason="test_registration_gpu.py compiles and runs")
def test_compiler_traces_all_batches_once_and_writes_no_input(run_without_interpreter: Callable[[str], str]) -> None:
    assert run_without_interpreter(TRACE) == "traced\n"
