"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

from typing import Literal

from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.causal_conv1d.api import require_conv_arguments, require_conv_kernel
from gbla_kernels.checks import eps_or_default, require_backend, require_float, require_same_device, require_shape
from gbla_kernels.dispatch import require_triton_device
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.rms_norm_causal_conv1d.autograd import rms_norm_causal_conv1d_triton
from gbla_kernels.rms_norm_causal_conv1d.forward import MAX_DIM
from gbla_kernels.rms_norm_causal_conv1d.reference import rms_norm_causal_conv1d_reference
from gbla_kernels.token_positions import token_positions


def rms_norm_causal_conv1d(
    x: Tensor,
    norm_weight: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    *,
    eps: float | None = None,
    layout: JaggedLayout | None = None,
    activation: Literal["silu"] | None = "silu",
    backend: Backend,
) -> Tensor:
    """Depthwise causal convolution of the RMSNorm of x, in one pass: what a pre-norm block feeds to its mixer.

    ``causal_conv1d(x * rsqrt(mean(x^2) + eps) * norm_weight, ...)`` with the mean over ``D`` (Zhang and Sennrich, arXiv
    1910.07467). Unlike ``nn.RMSNorm`` before ``causal_conv1d``, the normed values stay in fp32 and are never rounded.

    Args:
        x: ``(L, D)``, fp32, bf16, fp16 or fp64 (REFERENCE only); rows of a wider tensor are read in place.
        norm_weight: ``(D,)``, any float dtype.
        weight: ``(D, R)``, any float dtype; tap ``R - 1`` is the current token. TRITON takes up to 8 taps.
        bias: ``(D,)``, any float dtype, or None.
        offsets: ``(B + 1,)`` int64; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
        eps: added to the mean square, above 0; None is 1e-6.
        layout: the same rows with lengths on the host; without it TRITON finds the tokens' positions on the device, and
            REFERENCE reads offsets (a device sync).
        activation: ``silu``, or None for the bare convolution.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` never falls back. TRITON takes ``D`` up to 2048.

    Returns:
        ``(L, D)`` in the dtype of x, computed in fp32 and rounded once. Autocast changes nothing.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_backend(backend)
    require_conv_arguments(x, weight, bias, offsets, layout, activation)
    require_shape("norm_weight", norm_weight, (x.shape[1],), "(D,)")
    require_float("norm_weight", norm_weight)
    require_same_device(x=x, norm_weight=norm_weight)
    eps = eps_or_default(eps)
    if backend is not Backend.TRITON:
        return rms_norm_causal_conv1d_reference(x, norm_weight, weight, bias, offsets, layout, activation, eps)
    require_triton_device("rms_norm_causal_conv1d", x)
    require_conv_kernel(x=x, norm_weight=norm_weight, weight=weight, bias=bias)
    if x.shape[1] > MAX_DIM:
        raise NotImplementedError(
            f"x may have at most {MAX_DIM} channels with backend=Backend.TRITON, got {x.shape[1]}; use nn.RMSNorm, then causal_conv1d"
        )
    # the kernels read channels side by side
    x = x if x.stride(1) == 1 else x.contiguous()
    positions = token_positions(offsets, layout, x.shape[0])
    return rms_norm_causal_conv1d_triton(x, norm_weight, weight, bias, positions, eps, activation == "silu")
