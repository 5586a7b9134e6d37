"""What a compiler sees of the kernels, on a machine without a GPU: how often it compiles, and what each launch writes."""

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch
import triton
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from gbla_kernels.linear_attention.launch_config import HOPPER
from gbla_kernels.testing.compiled_kernels import DriverWithoutDevice

Written = list[list[set[str]]]
"""By graph (forward, backward) and launch: the arguments of the kernel that it writes, as torch's analysis has it."""


class _NotRunError(Exception):
    """The graph was made; there is nothing to run it on."""


def pretend_hopper(*apis: ModuleType) -> None:
    """From now on Triton compiles for Hopper, and these ops take tensors on the CPU for tensors on a GPU."""
    triton.runtime.driver.set_active(DriverWithoutDevice(10 * HOPPER))
    for api in apis:
        for check in ("require_triton_device", "require_offsets"):
            # the first would refuse tensors on the CPU, the second read them
            if hasattr(api, check):
                setattr(api, check, lambda *arguments: None)


def trace(function: Callable[..., Any], calls: Iterable[dict[str, Any]]) -> tuple[int, Written]:
    """The number of compilations of ``function``, all sizes symbolic, for these calls, and what its graphs write.

    Needs a process of its own without the interpreter, after ``pretend_hopper``.
    """
    written: Written = []

    def compile_graph(graph: fx.GraphModule, inputs: object) -> Callable[..., Any]:
        launches = [node.kwargs for node in graph.graph.nodes if "triton_kernel_wrapper" in str(node.target)]
        written.append([set(kwargs["tensors_to_clone"]) for kwargs in launches])

        def run(*arguments: object) -> None:
            raise _NotRunError

        return run

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(aot_autograd(fw_compiler=compile_graph))  # type: ignore[arg-type]
    compiled = torch.compile(function, backend=counter, fullgraph=True, dynamic=True)
    for arguments in calls:
        try:
            compiled(**arguments)
        except _NotRunError:
            continue
    return int(counter.frame_count), written
