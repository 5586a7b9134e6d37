"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

from typing import Literal

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.causal_conv1d.autograd import causal_conv1d_triton
from gbla_kernels.causal_conv1d.forward import MAX_TAPS
from gbla_kernels.causal_conv1d.reference import causal_conv1d_reference
from gbla_kernels.checks import (
    require_backend,
    require_choice,
    require_dim,
    require_float,
    require_offsets,
    require_same_device,
    require_shape,
    require_tensor,
)
from gbla_kernels.dispatch import require_triton_device
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.token_positions import token_positions


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    *,
    layout: JaggedLayout | None = None,
    activation: Literal["silu"] | None = "silu",
    backend: Backend,
) -> Tensor:
    """Depthwise causal convolution over a jagged batch; rows never see each other.

    Args:
        x: ``(L, D)``, fp32, bf16, fp16 or fp64 (REFERENCE only); rows of a wider tensor are read in place.
        weight: ``(D, R)``, any float dtype; tap ``R - 1`` is the current token. TRITON takes up to 8 taps.
        bias: ``(D,)``, any float dtype, or None.
        offsets: ``(B + 1,)`` int64; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
        layout: the same rows with lengths on the host; without it TRITON finds the tokens' positions on the device, and
            REFERENCE reads offsets (a device sync).
        activation: ``silu``, or None for the bare convolution.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` never falls back.

    Returns:
        ``(L, D)`` in the dtype of x, computed in fp32 and rounded once. Autocast changes nothing.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_backend(backend)
    require_conv_arguments(x, weight, bias, offsets, layout, activation)
    if backend is Backend.TRITON:
        require_triton_device("causal_conv1d", x)
        require_conv_kernel(x=x, weight=weight, bias=bias)
        # the kernels read channels side by side
        x = x if x.stride(1) == 1 else x.contiguous()
        return causal_conv1d_triton(x, weight, bias, token_positions(offsets, layout, x.shape[0]), activation == "silu")
    return causal_conv1d_reference(x, weight, bias, offsets, layout, activation)


def require_conv_arguments(
    x: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor, layout: JaggedLayout | None, activation: str | None
) -> None:
    """Raise ValueError unless shapes, dtypes and devices agree and the activation is known."""
    require_dim("x", x, 2, "(L, D)")
    require_dim("weight", weight, 2, "(D, R)")
    require_float("x", x)
    require_float("weight", weight)
    require_shape("weight", weight, (x.shape[1], weight.shape[1]), "(D, R)")
    if weight.shape[1] == 0:
        raise ValueError(f"weight must have at least one tap, got shape {tuple(weight.shape)}")
    if bias is not None:
        require_shape("bias", bias, (x.shape[1],), "(D,)")
        require_float("bias", bias)
    require_choice("activation", activation, ("silu", None))
    require_tensor("offsets", offsets)
    require_same_device(x=x, weight=weight, bias=bias, offsets=offsets)
    require_offsets(offsets, layout, x.shape[0])
    require_same_device(x=x, positions=None if layout is None else layout.positions)


def require_conv_kernel(*, weight: Tensor, **tensors: Tensor | None) -> None:
    """Raise NotImplementedError unless there is a Triton kernel for the taps of ``weight`` and all dtypes."""
    if weight.shape[1] > MAX_TAPS:
        raise NotImplementedError(
            f"weight may have at most {MAX_TAPS} taps with backend=Backend.TRITON, got {weight.shape[1]}; pass backend=Backend.REFERENCE"
        )
    for name, tensor in {"weight": weight, **tensors}.items():
        if tensor is not None and tensor.dtype == torch.float64:
            raise NotImplementedError(
                f"{name} must be fp32, bf16 or fp16 with backend=Backend.TRITON, got {tensor.dtype}; "
                "cast it or pass backend=Backend.REFERENCE"
            )
