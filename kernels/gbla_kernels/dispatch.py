"""What every Triton op shares: where it can run, how its kernels are launched, how it is registered with torch.library."""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
"""True under ``TRITON_INTERPRET=1``: kernels run on the CPU, for tests."""

Launcher = Callable[[Any, tuple[Any, ...]], Callable[..., Any]]
"""``launcher(kernel, grid)(*arguments)`` runs a kernel."""

OPS_OF_HEADS = ("linear_attention", "cross_attention")
"""Those whose kernels take more of a GPU the wider heads are."""


def launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """Launch directly: the least overhead; not visible to the compiler."""
    return on_device_of_first(kernel, kernel[grid])


def traced_launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """Launch inside a registered op, so that torch.compile, torch.export and AOTInductor see the kernel."""
    return on_device_of_first(kernel, kernel[grid] if INTERPRETED else wrap_triton(kernel)[grid])


def on_device_of_first(kernel: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """``run``, with the device of its first argument, a tensor, as the current one: Triton launches on the current device and stream.

    A compiler, whose tensors are none, sees to the device itself. Where the GPU is too small for ``kernel``, which ``run`` launches, the
    call raises NotImplementedError.
    """

    def run_there(first: Tensor, *arguments: Any, **keywords: Any) -> None:
        try:
            if INTERPRETED or not _is_plain(first) or first.get_device() == torch.cuda.current_device():
                run(first, *arguments, **keywords)
            else:
                with torch.cuda.device(first.get_device()):
                    run(first, *arguments, **keywords)
        except triton.OutOfResources as error:
            raise NotImplementedError(_too_small(kernel, error)) from error

    return run_there


def _too_small(kernel: Any, error: Any) -> str:
    """What a kernel asks of a GPU that has less of it; an op's kernels are in a folder of its name."""
    op = kernel.fn.__module__.split(".")[-2]
    unit = "bytes of " if error.name == "shared memory" else ""
    narrower = ", or use narrower heads (K, V <= 64)" if op in OPS_OF_HEADS else ""
    return (
        f"{op}: {kernel.fn.__name__} needs {error.required:,} {unit}{error.name}, and this GPU allows a program {error.limit:,}; "
        f"pass backend=Backend.REFERENCE{narrower}"
    )


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of tensors as the op ``gbla_kernels::<name>``: functional, its kernels visible to the compiler.

    Under the interpreter, where no compiler can see a kernel, the op is opaque and needs ``register_fake``.
    """
    return custom_op(f"gbla_kernels::{name}", mutates_args=()) if INTERPRETED else triton_op(f"gbla_kernels::{name}", mutates_args=())


def is_traced(*tensors: Tensor | None) -> bool:
    """True if the call must go through the registered op: under a compiler, an exporter, or fake and functional tensors."""
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and not _is_plain(x) for x in tensors) or torch._C._len_torch_dispatch_stack() > 0


def _is_plain(x: Tensor) -> bool:
    """False for fake and functional tensors and other subclasses."""
    return type(x) in (Tensor, torch.nn.Parameter)


def require_triton_device(op: str, tensor: Tensor) -> None:
    """Raise ValueError unless Triton kernels can run on the tensor's device."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: backend=Backend.TRITON needs CUDA tensors, got {tensor.device}; move them or pass backend=Backend.REFERENCE"
        )
