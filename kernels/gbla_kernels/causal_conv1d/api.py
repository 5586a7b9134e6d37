"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

from typing import Literal

from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.causal_conv1d.reference import causal_conv1d_reference
from gbla_kernels.checks import require_choice, require_dim, require_float, require_offsets, require_same_device, require_shape
from gbla_kernels.layout import JaggedLayout


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
        x: ``(L, D)``, fp32, bf16, fp16 or fp64.
        weight: ``(D, R)``; tap ``R - 1`` is the current token.
        bias: ``(D,)`` or None.
        offsets: ``(B + 1,)`` int64; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
        layout: the same rows with lengths on the host; without it the reference backend reads offsets (a device sync).
        activation: ``silu``, or None for the bare convolution.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` never falls back.

    Returns:
        ``(L, D)`` in the dtype of x.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_dim("x", x, 2, "(L, D)")
    require_dim("weight", weight, 2, "(D, R)")
    require_float("x", x)
    require_shape("weight", weight, (x.shape[1], weight.shape[1]), "(D, R)")
    if weight.shape[1] == 0:
        raise ValueError(f"weight must have at least one tap, got shape {tuple(weight.shape)}")
    if bias is not None:
        require_shape("bias", bias, (x.shape[1],), "(D,)")
    require_choice("activation", activation, ("silu", None))
    require_same_device(x=x, weight=weight, bias=bias, offsets=offsets)
    require_offsets(offsets, layout, x.shape[0])
    if backend is Backend.TRITON:
        raise NotImplementedError("causal_conv1d has no Triton kernel yet; pass backend=Backend.REFERENCE")
    return causal_conv1d_reference(x, weight, bias, offsets, layout, activation)
