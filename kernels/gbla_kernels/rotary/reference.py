"""Rotary position embedding, as the formula reads (Su et al., arXiv 2104.09864)."""

# L tokens, H heads, K head width (docs/shapes.md)

import torch
from torch import Tensor


def rotary_reference(query: Tensor, key: Tensor, positions: Tensor, base: float) -> tuple[Tensor, Tensor]:
    """Query and key ``(L, H, K)``, turned by ``positions (L,)``; computed in fp32, or in fp64 for fp64 inputs."""
    cosine, sine = rotary_tables(positions, query.shape[2], base, torch.promote_types(query.dtype, torch.float32))
    return rotate(query, cosine, sine), rotate(key, cosine, sine)


def rotary_tables(positions: Tensor, head_dim: int, base: float, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(L, 1, K / 2)`` of ``position * base^(-2 i / K)``."""
    # fp64: an fp32 angle is up to 0.01 off at position 131072
    frequency = base ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angle = positions[:, None, None] * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn the halves of ``x (L, H, K)`` as pairs by the angles of ``rotary_tables``; dtype of x, rounded once."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1).to(x.dtype)
