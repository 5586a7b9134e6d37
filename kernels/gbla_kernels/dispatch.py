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


def launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """Launch directly: the least overhead; not visible to the compiler."""
    return kernel[grid]  # type: ignore[no-any-return]


def traced_launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., Any]:
    """Launch inside a registered op, so that torch.compile, torch.export and AOTInductor see the kernel."""
    return kernel[grid] if INTERPRETED else wrap_triton(kernel)[grid]  # type: ignore[no-any-return]


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function of tensors as the op ``gbla_kernels::<name>``: functional, its kernels visible to the compiler.

    Under the interpreter, where no compiler can see a kernel, the op is opaque and needs ``register_fake``.
    """
    return custom_op(f"gbla_kernels::{name}", mutates_args=()) if INTERPRETED else triton_op(f"gbla_kernels::{name}", mutates_args=())


def is_traced(*tensors: Tensor | None) -> bool:
    """True if the call must go through the registered op: under a compiler, an exporter, or fake and functional tensors."""
    if torch.compiler.is_compiling():
        return True
    return any(x is not None and type(x) not in (Tensor, torch.nn.Parameter) for x in tensors) or torch._C._len_torch_dispatch_stack() > 0


def require_triton_device(op: str, tensor: Tensor) -> None:
    """Raise ValueError unless Triton kernels can run on the tensor's device."""
    if tensor.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{op}: backend=Backend.TRITON needs CUDA tensors, got {tensor.device}; move them or pass backend=Backend.REFERENCE"
        )
