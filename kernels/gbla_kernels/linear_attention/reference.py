"""The op in plain PyTorch: exact, differentiable, and the truth that every kernel is tested against."""

# B rows, L tokens, T tokens of one row, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gbla_kernels.checks import row_lengths
from gbla_kernels.layout import JaggedLayout

QUERY_BLOCK = 1024
"""Queries per block of the causal form, which is quadratic: bounds its memory."""


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


def causal_row(query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor) -> tuple[Tensor, Tensor]:
    """One row in which token t sees tokens <= t: as ``bidirectional_row``, with logits ``key_gate`` and prefix sums.

    Each prefix is shifted by its own maximum, so a late large gate cannot push earlier prefixes into underflow.
    """
    logits = key_gate.movedim(0, -1)
    prefix_max = torch.cummax(logits.detach(), dim=-1).values
    prefix_max = prefix_max.masked_fill(prefix_max == -torch.inf, 0)
    outputs, normalizers = [], []
    for start in range(0, query.shape[0], QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, query.shape[0])
        is_future = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).triu(diagonal=start + 1)
        exponent = (logits[:, None, :stop] - prefix_max[:, start:stop, None]).masked_fill(is_future, -torch.inf)
        score = torch.einsum("thk,shk->hts", query[start:stop], key[:stop]) * torch.exp(exponent)
        outputs.append(torch.einsum("hts,shv->thv", score, value[:stop]))
        normalizers.append(score.sum(dim=-1).movedim(0, -1))
    return torch.cat(outputs), torch.cat(normalizers)


def attend_row(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    *,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> Tensor:
    """The formula for one row, ``(T, H, V)``; arguments as in the op, all of one dtype, ``key_gate`` given."""
    phi_query, phi_key = apply_feature_map(query, feature_map), apply_feature_map(key, feature_map)
    if direction == "causal":
        attended, normalizer = causal_row(phi_query, phi_key, value, key_gate)
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

    Rows are computed one by one, so a row's result is bit-identical whoever shares its batch.
    """
    compute = torch.promote_types(value.dtype, torch.float32)
    # zeros: None weighs tokens equally
    logits = torch.zeros(query.shape[:2], dtype=compute, device=query.device) if key_gate is None else key_gate.to(compute)
    weight = None if norm_weight is None else norm_weight.to(compute)
    lengths = row_lengths(offsets, layout)
    rows = zip(*(tensor.to(compute).split(lengths) for tensor in (query, key, value, logits)), strict=True)
    gates: Sequence[Tensor | None] = [None] * len(lengths) if output_gate is None else output_gate.to(compute).split(lengths)
    outputs = [
        attend_row(q, k, v, logit, gate, weight, feature_map=feature_map, normalize=normalize, eps=eps, direction=direction)
        for (q, k, v, logit), gate in zip(rows, gates, strict=True)
        if q.shape[0] > 0
    ]
    if not outputs:
        # every input stays in the graph, so gradients are zero and not None
        inputs = (query, key, logits, output_gate, weight)
        outputs = [value.to(compute) + sum(x.sum() for x in inputs if x is not None) * 0]
    return torch.cat(outputs).to(value.dtype)
