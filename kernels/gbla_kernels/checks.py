"""Validation of op arguments: a wrong call gets one error that names the argument, the rule and the value."""

import math

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.layout import JaggedLayout

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a tensor: a list would fail at the first attribute that it lacks, without its name."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(value).__name__} {value!r:.60}; torch.as_tensor makes one")


def require_layout(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a ``JaggedLayout``."""
    if not isinstance(value, JaggedLayout):
        raise ValueError(
            f"{name} must be a JaggedLayout, got {type(value).__name__} {value!r:.60}; JaggedLayout.from_lengths or from_offsets makes one"
        )


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...], legend: str) -> None:
    """Raise ValueError unless ``tensor`` is one and has ``shape``; ``legend`` names the dimensions, e.g. ``"(L, H, K)"``."""
    require_tensor(name, tensor)
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {legend} = {shape}, got {tuple(tensor.shape)}")


def require_dim(name: str, tensor: Tensor, dim: int, legend: str) -> None:
    """Raise ValueError unless ``tensor`` is one and has ``dim`` dimensions."""
    require_tensor(name, tensor)
    if tensor.dim() != dim:
        raise ValueError(f"{name} must have {dim} dimensions {legend}, got shape {tuple(tensor.shape)}")


def require_float(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is fp32, bf16, fp16 or fp64."""
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} must be one of {FLOATS}, got {tensor.dtype}")


def require_same_device(**tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors are on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"all tensors must be on one device, got { ({name: str(device) for name, device in devices.items()}) }")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def require_backend(backend: object) -> None:
    """Raise ValueError unless ``backend`` is a ``Backend``; the string "triton" would run the reference, as it is not TRITON."""
    if not isinstance(backend, Backend):
        raise ValueError(f"backend must be Backend.REFERENCE or Backend.TRITON, got {backend!r}")


def require_offsets(offsets: Tensor, layout: JaggedLayout | None, num_tokens: int) -> None:
    """Raise ValueError unless offsets are ``(B + 1,)`` int64 and agree with ``layout`` in size.

    Values are checked only where they are on the CPU and at hand: reading them on a GPU would synchronise, and a compiler has
    none.
    """
    require_dim("offsets", offsets, 1, "(B + 1,)")
    if offsets.dtype != torch.int64 or offsets.numel() == 0:
        raise ValueError(f"offsets must be int64 with at least one entry, got {offsets.dtype} of {offsets.numel()} entries")
    if layout is not None:
        require_layout("layout", layout)
        if layout.num_rows != offsets.numel() - 1 or layout.num_tokens != num_tokens:
            raise ValueError(
                f"layout must describe offsets and values, got {layout.num_rows} rows of {layout.num_tokens} tokens "
                f"for {offsets.numel() - 1} rows of {num_tokens} tokens"
            )
        require_same_device(offsets=offsets, layout=layout.offsets)
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(offsets[0]) != 0 or int(offsets[-1]) != num_tokens or bool((offsets.diff() < 0).any()):
            raise ValueError(f"offsets must rise from 0 to the number of tokens {num_tokens}, got {offsets.tolist()[:16]}")


def eps_or_default(eps: float | None) -> float:
    """``eps``, or 1e-6 for None; raises ValueError unless it is a finite float above 0.

    0 would make NaN of a token of zeros: ``0 * rsqrt(0)``. None is not a default argument, nor a global: ``torch.compile(dynamic=True)``
    takes those for inputs, and analyses the call a second time without them.
    """
    if eps is None:
        return 1e-6
    # a tensor on a GPU would be read by the comparison, which synchronises
    if not isinstance(eps, (float, int, torch.SymFloat)) or not 0 < eps < math.inf:
        raise ValueError(f"eps must be a finite float above 0, or None for 1e-6, got {eps!r}")
    return eps


def row_lengths(offsets: Tensor, layout: JaggedLayout | None) -> list[int]:
    """Row lengths on the host, ``(B,)``; without a layout, offsets on a GPU are read, which synchronises."""
    if layout is not None:
        return layout.row_lengths
    lengths: list[int] = offsets.diff().tolist()
    return lengths
