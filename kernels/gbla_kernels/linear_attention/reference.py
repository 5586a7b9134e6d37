"""The op in plain PyTorch: exact, differentiable, and the truth that every kernel is tested against."""

# B rows, L tokens, T tokens of one row, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gbla_kernels.checks import row_lengths
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.causal_rows import causal_rows


def apply_feature_map(x: Tensor, feature_map: str) -> Tensor:
    """phi(x): ``relu``, or ``elu1`` = x + 1 above 0, exp(x) below (never through expm1, which loses small values)."""
    if feature_map == "relu":
        return F.relu(x)
    return torch.where(x > 0, x + 1, torch.exp(x.clamp(max=0)))


def key_weights(key_gate: Tensor) -> Tensor:
    """Softmax over the row, ``(T, H) -> (T, H)``; a column of only -inf gives zeros instead of NaN."""
    maximum = key_gate.amax(dim=0, keepdim=True).detach()
    weight = torch.exp(key_gate - maximum.masked_fill(maximum == -torch.inf, 0))
    return safe_divide(weight, weight.sum(dim=0, keepdim=True))


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """``numerator / denominator``, with zero result and zero gradients where the denominator is zero."""
    is_zero = denominator == 0
    return torch.where(is_zero, 0, numerator / torch.where(is_zero, 1, denominator))


def bidirectional_row(query: Tensor, key: Tensor, value: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """One row: ``u_t = phi(q_t) S`` ``(T, H, V)`` and ``c_t = phi(q_t) . n`` ``(T, H)``.

    Args:
        query: ``(T, H, K)``, already feature-mapped, like key.
        key: ``(T, H, K)``.
        value: ``(T, H, V)``.
        weight: ``(T, H)``, the softmax of the key gate.
    """
    weighted_key = key * weight[..., None]
    state = torch.einsum("thk,thv->hkv", weighted_key, value)
    normalizer = weighted_key.sum(dim=0)
    return torch.einsum("thk,hkv->thv", query, state), torch.einsum("thk,hk->th", query, normalizer)


def mixed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    lengths: Sequence[int],
    *,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> Tensor:
    """The formula, ``(L, H, V)``; arguments as in the op, all of one dtype, ``key_gate`` given. Several rows only where it is causal."""
    phi_query, phi_key = apply_feature_map(query, feature_map), apply_feature_map(key, feature_map)
    if direction == "causal":
        attended, normalizer = causal_rows(phi_query, phi_key, value, key_gate, lengths)
    else:
        attended, normalizer = bidirectional_row(phi_query, phi_key, value, key_weights(key_gate))
    if normalize:
        attended = safe_divide(attended, normalizer[..., None])
    if norm_weight is not None:
        attended = attended * torch.rsqrt(attended.square().mean(dim=-1, keepdim=True) + eps) * norm_weight
    if output_gate is not None:
        attended = attended * F.silu(output_gate)
    return attended


def gated_linear_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    offsets: Tensor,
    layout: JaggedLayout | None,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> Tensor:
    """See ``gbla_kernels.gated_linear_attention``. Half precision is computed in fp32 and rounded once, at the output.

    Rows are computed one by one, so a row's result is bit-identical whoever shares its batch; but causal rows on a GPU, where
    each operation costs a launch, are computed together.
    """
    compute = torch.promote_types(value.dtype, torch.float32)
    # zeros: None weighs tokens equally
    logits = torch.zeros(query.shape[:2], dtype=compute, device=query.device) if key_gate is None else key_gate.to(compute)
    weight = None if norm_weight is None else norm_weight.to(compute)
    gate = None if output_gate is None else output_gate.to(compute)
    settings: dict[str, Any] = {"feature_map": feature_map, "normalize": normalize, "eps": eps, "direction": direction}
    lengths = row_lengths(offsets, layout)
    queries, keys, values = (tensor.to(compute) for tensor in (query, key, value))
    if not any(lengths):
        # every input stays in the graph, so gradients are zero and not None
        inputs = (query, key, logits, gate, weight)
        return (value.to(compute) + sum(x.sum() for x in inputs if x is not None) * 0).to(value.dtype)
    # autocast would round the products' inputs to half precision
    with torch.autocast(value.device.type, enabled=False):
        if direction == "causal" and value.is_cuda:
            return mixed(queries, keys, values, logits, gate, weight, lengths, **settings).to(value.dtype)
        gates: Sequence[Tensor | None] = [None] * len(lengths) if gate is None else gate.split(lengths)
        rows = zip(*(tensor.split(lengths) for tensor in (queries, keys, values, logits)), gates, strict=True)
        outputs = [mixed(q, k, v, logit, row_gate, weight, [len(q)], **settings) for q, k, v, logit, row_gate in rows if len(q)]
        return torch.cat(outputs).to(value.dtype)
