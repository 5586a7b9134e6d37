"""The public op: validation, then the backend that the caller chose."""

# L tokens, H heads, K head width (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.checks import require_backend, require_dim, require_float, require_same_device, require_shape
from gbla_kernels.dispatch import require_triton_device
from gbla_kernels.rotary.autograd import rotary_triton
from gbla_kernels.rotary.reference import rotary_reference


def rotary_embedding(
    query: Tensor, key: Tensor, positions: Tensor, *, base: float | None = None, backend: Backend
) -> tuple[Tensor, Tensor]:
    """Turn the halves of each query and key, as pairs, by ``position * base^(-2 i / K)`` (Su et al., arXiv 2104.09864).

    Whole turns are dropped in fp64, so the angle is as exact at position 131,072 as at 0.

    Args:
        query: ``(L, H, K)``, K even, fp32, bf16, fp16 or fp64 (REFERENCE only); a view of a projection is read in place.
        key: the same.
        positions: ``(L,)`` int64, the index of each token in its row: ``JaggedLayout.positions``.
        base: of the frequencies, above 1; None is 10,000. ``torch.compile(dynamic=True)`` takes a float, even one that never changes, for
            an input, and analyses the first call a second time without it.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` is one kernel, needs CUDA (or the interpreter) and never falls back.

    Returns:
        Query and key, contiguous under TRITON, in their dtypes, computed in fp32 (fp64 for fp64) and rounded once. Autocast changes
        nothing.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: for fp64 with TRITON.
    """
    require_backend(backend)
    require_dim("query", query, 3, "(L, H, K)")
    require_shape("key", key, tuple(query.shape), "(L, H, K)")
    require_shape("positions", positions, (query.shape[0],), "(L,)")
    require_float("query", query)
    if key.dtype != query.dtype:
        raise ValueError(f"key must have the dtype of query, got {key.dtype} and {query.dtype}")
    if positions.dtype != torch.int64:
        raise ValueError(f"positions must be int64, got {positions.dtype}")
    if query.shape[2] == 0 or query.shape[2] % 2:
        raise ValueError(f"the head width K must be even and positive (pairs are turned), got {query.shape[2]}")
    # neither a default argument nor a global, for the reason that eps_or_default gives
    base = 10_000.0 if base is None else base
    if base <= 1:
        raise ValueError(f"base must be above 1, got {base}")
    require_same_device(query=query, key=key, positions=positions)
    if backend is Backend.TRITON:
        require_triton_device("rotary_embedding", query)
        if query.dtype == torch.float64:
            raise NotImplementedError(
                "query must be fp32, bf16 or fp16 with backend=Backend.TRITON, got fp64; cast it or pass backend=Backend.REFERENCE"
            )
        return rotary_triton(query, key, positions, base)
    return rotary_reference(query, key, positions, base)
