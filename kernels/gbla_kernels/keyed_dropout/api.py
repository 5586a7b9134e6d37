"""Dropout whose mask is a pure function of the token: the same on any number of ranks and after a resume.

Ordinary dropout draws from a per-process generator, so 1 rank and 2 ranks would see different masks and a resumed run
would need the generator's state. Here each token brings a 64-bit key (made from seed, epoch, user, cut and position).
"""

# L tokens, D width (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gbla_kernels.backend import Backend
from gbla_kernels.checks import require_backend, require_dim, require_float, require_same_device, require_shape
from gbla_kernels.dispatch import is_traced, require_triton_device
from gbla_kernels.keyed_dropout.forward import keyed_dropout_forward
from gbla_kernels.keyed_dropout.reference import keyed_dropout_reference


def keyed_dropout(
    x: Tensor, token_keys: Tensor | None, probability: float, salt: int, *, residual: Tensor | None = None, backend: Backend
) -> Tensor:
    """Zero each element with ``probability``, scale the rest by ``1 / (1 - probability)``, and add ``residual``.

    An element is dropped by 16 bits of SplitMix64's output function of its token's key, the salt and its column, so that both
    backends drop the same elements, and round alike.

    Args:
        x: ``(L, D)``, fp32, bf16, fp16 or fp64 (REFERENCE only).
        token_keys: ``(L,)`` int64; equal keys get equal masks. None drops nothing (evaluation).
        probability: in [0, 1), met to 1 / 65,536; 0 drops nothing.
        salt: names the place in the model, so that two dropouts of one token differ; at least 0 and below 2^31.
        residual: ``(L, D)``, what the result is added to; any of the dtypes.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` is one kernel, needs CUDA (or the interpreter) and never falls back. Inside a
            traced graph (torch.compile, torch.export) both are the formula itself, which a compiler fuses with its neighbours.

    Returns:
        ``(L, D)`` in the dtype of ``residual + x``. Autocast changes nothing.

    Raises:
        ValueError: if shapes, dtypes or devices disagree, or a number is out of range; the message names the argument and the value.
        NotImplementedError: for fp64 with TRITON.
    """
    require_backend(backend)
    if not 0 <= probability < 1:
        raise ValueError(f"probability must lie in [0, 1), got {probability}")
    _check(x, token_keys, salt, residual)
    if token_keys is None or probability == 0:
        return x if residual is None else residual + x
    if backend is Backend.REFERENCE or is_traced(x, residual):
        return keyed_dropout_reference(x, token_keys, probability, salt, residual)
    require_triton_device("keyed_dropout", x)
    if torch.float64 in (x.dtype, None if residual is None else residual.dtype):
        raise NotImplementedError(
            "x and residual must be fp32, bf16 or fp16 with backend=Backend.TRITON, got fp64; cast them or pass backend=Backend.REFERENCE"
        )
    return _KeyedDropout.apply(x, token_keys, probability, salt, residual)  # type: ignore[no-any-return, no-untyped-call]


def _check(x: Tensor, token_keys: Tensor | None, salt: int, residual: Tensor | None) -> None:
    require_dim("x", x, 2, "(L, D)")
    require_float("x", x)
    if token_keys is not None:
        require_shape("token_keys", token_keys, (x.shape[0],), "(L,)")
        if token_keys.dtype != torch.int64:
            raise ValueError(f"token_keys must be int64, got {token_keys.dtype}")
    if not 0 <= salt < 2**31:
        raise ValueError(f"salt must be at least 0 and below 2^31, got {salt}")
    if residual is not None:
        require_shape("residual", residual, tuple(x.shape), "(L, D)")
        require_float("residual", residual)
    require_same_device(x=x, token_keys=token_keys, residual=residual)


class _KeyedDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, token_keys: Tensor, probability: float, salt: int, residual: Tensor | None) -> Tensor:
        ctx.save_for_backward(token_keys)
        ctx.probability, ctx.salt, ctx.dtype = probability, salt, x.dtype
        ctx.residual_dtype = None if residual is None else residual.dtype
        return keyed_dropout_forward(_dense(x), token_keys, probability, salt, None if residual is None else _dense(residual))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        (token_keys,) = ctx.saved_tensors
        d_x = d_residual = None
        if ctx.needs_input_grad[0]:
            # the mask is drawn again: nothing of size (L, D) is kept
            d_x = keyed_dropout_forward(_dense(d_out.to(ctx.dtype)), token_keys, ctx.probability, ctx.salt, None)
        if ctx.needs_input_grad[4]:
            d_residual = d_out.to(ctx.residual_dtype)
        return d_x, None, None, None, d_residual


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()
