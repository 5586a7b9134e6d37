"""The kernels of ``gated_linear_attention`` as a GPU of any architecture would get them, compiled on a machine that has none.

Needs a process of its own without the interpreter.
"""

# L tokens, H heads, K key width, V value width (docs/shapes.md)

import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from gbla_kernels.backend import Backend
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention import api, autograd, launches
from gbla_kernels.linear_attention.launch_config import HOPPER

Compile = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]
"""``compile(kernel, arguments, keywords)``, in place of a launch."""

# a tile is its sizes and type, "64x64xbf16"; an encoding, of shared memory or (a layout) of registers, "#name" or written out
_ENCODING = re.compile(r"^(#\w+) = (#ttg\.\w*shared<.*>)$", re.MULTILINE)
_COPY = re.compile(r"ttg\.async_copy_global_to_local .*: tensor<\w+x!tt\.ptr<\w+>, (.+)> -> <(\w+), (#\w+), ")
_READ = re.compile(r"ttg\.local_load .*: !ttg\.memdesc<(\w+), (#\w+), .*> -> tensor<\w+, (.+?)>(?: loc\(.*)?$", re.MULTILINE)
_BUFFERS = re.compile(r"ttg\.local_alloc : \(\) ->")


class DriverWithoutDevice:
    """What Triton asks of a driver before it loads a kernel.

    Attributes:
        capability: compute capability times ten.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Another one for each capability: Triton keeps a target for each device."""
        return self.capability

    def get_current_stream(self, device: int | None = None) -> int:
        """The default one."""
        return 0


def replace_launches(compile_instead: Compile, *modules: ModuleType, capability: int) -> None:
    """From now on the ops of ``modules``, called on CPU tensors, hand over each launch that a GPU of this ``capability`` would get."""

    def launch(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., None]:
        return lambda *arguments, **keywords: compile_instead(kernel, arguments, keywords)

    triton.runtime.driver.set_active(DriverWithoutDevice(capability))
    replacements = {
        "launch": launch,
        "require_triton_device": lambda op, tensor: None,
        "is_hopper": lambda device: capability // 10 == HOPPER,
    }
    for module in modules:
        for name in replacements.keys() & vars(module).keys():
            setattr(module, name, replacements[name])


def call_op(
    compile_instead: Compile,
    lengths: Sequence[int],
    head_dim: int,
    *,
    capability: int,
    with_backward: bool,
    dtype: torch.dtype = torch.bfloat16,
    num_heads: int = 8,
    value_dim: int | None = None,
    normalize: bool = True,
) -> None:
    """Hand over each launch of a forward, or of a forward and backward, with the op's own launch parameters for this GPU.

    The norm and both gates are on, and the normaliser if ``normalize``; no kernel reads the tensors. ``lengths`` are the tokens of each
    row, ``capability`` is ten times the compute capability, ``value_dim`` (default: ``head_dim``) the width of values.
    """
    replace_launches(compile_instead, api, autograd, launches, capability=capability)
    layout = JaggedLayout.from_lengths(lengths)
    value_dim = value_dim or head_dim
    widths = (head_dim, head_dim, value_dim, value_dim)
    projection = torch.zeros(sum(lengths), num_heads * sum(widths) + 64, dtype=dtype)
    *wide, key_gate, _ = projection.split([*(num_heads * width for width in widths), num_heads, 64 - num_heads], dim=-1)
    query, key, value, output_gate = (part.unflatten(-1, (num_heads, -1)) for part in wide)
    inputs = [query, key, value, key_gate, output_gate, torch.ones(num_heads, value_dim, dtype=dtype)]
    leaves = [tensor.detach().requires_grad_(with_backward) for tensor in inputs]
    op: Callable[..., Tensor] = api.gated_linear_attention
    output = op(*leaves, layout.offsets, layout=layout, normalize=normalize, backend=Backend.TRITON)
    if with_backward:
        torch.autograd.grad(output, leaves, torch.zeros_like(output))


class _LoweredError(Exception):
    """Compilation has come as far as was asked: the module as text, and the metadata."""


def specialization(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """Name of the kernel that a launch needs, and all that Triton tells compilations of it apart by."""
    found: list[str] = []

    def record_and_refuse(**event: Any) -> bool:
        found.append(str(event["key"]))
        return True

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.jit_cache_hook = record_and_refuse
        kernel.warmup(*arguments, grid=(1,), **keywords)
    assert found, f"{kernel.fn.__name__} was compiled before"
    return f"{kernel.fn.__name__} {found[0]}"


def lower(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], *, last: str) -> tuple[str, dict[str, Any]]:
    """What the compiler makes of a launch up to the stage ``last`` (``"ttgir"``, ``"llir"``), and the metadata that it has by then.

    Stops there: the stages after it are half of the time.
    """

    def stop(module: Any, metadata: dict[str, Any]) -> None:
        raise _LoweredError(str(module), metadata)

    def stop_after_last(backend: Any = None, stages: dict[str, Any] | None = None, *rest: Any) -> tuple[str, str]:
        if stages is not None:
            names = list(stages)
            stages[names[names.index(last) + 1]] = stop
        # Triton 3.7 asks first, without stages, what its caches must tell apart
        return f"no stage after {last}", f"no stage after {last}"

    with triton.knobs.runtime.scope(), triton.knobs.compilation.scope():
        triton.knobs.runtime.add_stages_inspection_hook = stop_after_last
        # Triton 3.6 would take what its cache has, whole
        triton.knobs.compilation.always_compile = True
        try:
            kernel.warmup(*arguments, grid=(1,), **keywords)
        except _LoweredError as lowered:
            text, metadata = lowered.args
            return text, metadata
    raise AssertionError(f"compilation went past {last}")


def copied_tiles(ttgir: str) -> tuple[int, list[str]]:
    """How many tiles asynchronous copies bring, and how those that lie unswizzled in shared memory are read in another layout.

    In the layout of the copy, 16 bytes a thread in order, an unswizzled tile is read without bank conflicts; in that of a dot's result
    eight rows of a warp meet in the same banks.
    """
    encodings = dict(_ENCODING.findall(ttgir))
    copied: dict[tuple[str, str], set[str]] = {}
    for layout, tile, encoding in _COPY.findall(ttgir):
        copied.setdefault((tile, encoding), set()).add(layout)
    if not copied:
        raise ValueError("ttgir must have asynchronous copies into shared memory, as Triton 3.6 and 3.7 write them, got none")
    conflicts = [
        f"{tile} {encodings[encoding]} in {layout}"
        for tile, encoding, layout in _READ.findall(ttgir)
        if (tile, encoding) in copied and _is_unswizzled(encodings[encoding]) and layout not in copied[tile, encoding]
    ]
    return len(_BUFFERS.findall(ttgir)), conflicts


def _is_unswizzled(encoding: str) -> bool:
    for field, none in (("maxPhase", 1), ("swizzlingByteWidth", 0)):
        if found := re.search(rf"\b{field} = (\d+)", encoding):
            return int(found[1]) == none
    raise ValueError(f"encoding must be swizzled_shared or nvmma_shared, got {encoding}")
