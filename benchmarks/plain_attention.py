"""The op as two matrix products in plain torch, for one row: what a user would write and give to ``torch.compile``."""

# T tokens of one row, H heads, K key width, V value width (docs/shapes.md)

import torch
import torch.nn.functional as F
from torch import Tensor


def phi(x: Tensor) -> Tensor:
    """``x + 1`` above 0 and ``exp(x)`` below, rounded to the dtype of x."""
    wide = x.float()
    return torch.where(wide > 0, wide + 1, torch.exp(wide.clamp(max=0))).to(x.dtype)


def gated_norm(attended: Tensor, output_gate: Tensor, norm_weight: Tensor, eps: float = 1e-6) -> Tensor:
    """``RMSNorm(attended) * norm_weight * silu(output_gate)``, ``(T, H, V)``."""
    wide = attended.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * norm_weight.float()
    return (normed * F.silu(output_gate.float())).to(attended.dtype)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor, output_gate: Tensor, norm_weight: Tensor) -> Tensor:
    """``gated_linear_attention`` of one row, ``(T, H, K)`` and ``(T, H, V)``, both products in the dtype of the inputs."""
    weight = torch.softmax(key_gate.float(), dim=0)
    mapped_query, weighted_key = phi(query), (phi(key) * weight[..., None]).to(key.dtype)
    state = torch.einsum("thk,thv->hkv", weighted_key, value)
    normalizer = weighted_key.float().sum(dim=0)
    denominator = (mapped_query.float() * normalizer).sum(dim=-1, keepdim=True)
    attended = torch.einsum("thk,hkv->thv", mapped_query, state) / denominator.to(query.dtype)
    return gated_norm(attended, output_gate, norm_weight)
