"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

from typing import Literal

from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.checks import require_choice, require_dim, require_float, require_offsets, require_same_device, require_shape
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.reference import gated_linear_attention_reference


def gated_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    offsets: Tensor,
    *,
    layout: JaggedLayout | None = None,
    feature_map: Literal["elu1", "relu"] = "elu1",
    normalize: bool = True,
    eps: float = 1e-6,
    direction: Literal["bidirectional", "causal"] = "bidirectional",
    backend: Backend,
) -> Tensor:
    """Gated bidirectional linear attention over a jagged batch; rows never see each other.

    ``y_t = RMSNorm(phi(q_t) S / (phi(q_t) . n)) * norm_weight * silu(output_gate_t)`` with ``S = sum_t a_t phi(k_t) v_t^T``,
    ``n = sum_t a_t phi(k_t)`` and ``a`` the softmax of ``key_gate`` over the row (arXiv 2606.07317; see this folder's README).

    Args:
        query: ``(L, H, K)``, fp32, bf16, fp16 or fp64.
        key: ``(L, H, K)``, dtype of query.
        value: ``(L, H, V)``, dtype of query.
        key_gate: ``(L, H)`` logits, any float dtype; ``-inf`` silences a token, ``+inf`` and NaN are not allowed. None weighs
            the tokens of a row equally.
        output_gate: ``(L, H, V)`` or None for no gate.
        norm_weight: ``(H, V)`` or None for no RMSNorm.
        offsets: ``(B + 1,)`` int64; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
        layout: the same rows with lengths on the host; without it the reference backend reads offsets (a device sync).
        feature_map: ``elu1`` is ``x + 1`` above 0 and ``exp(x)`` below; ``relu``.
        normalize: divide by ``phi(q_t) . n``; a zero denominator gives 0 and zero gradients.
        eps: added to the mean square in RMSNorm.
        direction: ``causal`` lets token t see tokens <= t of its row; needs ``normalize=True``.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` never falls back.

    Returns:
        ``(L, H, V)`` in the dtype of value.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_dim("query", query, 3, "(L, H, K)")
    require_dim("value", value, 3, "(L, H, V)")
    num_tokens, num_heads, key_dim = query.shape
    value_dim = value.shape[2]
    require_shape("key", key, (num_tokens, num_heads, key_dim), "(L, H, K)")
    require_shape("value", value, (num_tokens, num_heads, value_dim), "(L, H, V)")
    if key_gate is not None:
        require_shape("key_gate", key_gate, (num_tokens, num_heads), "(L, H)")
        require_float("key_gate", key_gate)
    if output_gate is not None:
        require_shape("output_gate", output_gate, (num_tokens, num_heads, value_dim), "(L, H, V)")
    if norm_weight is not None:
        require_shape("norm_weight", norm_weight, (num_heads, value_dim), "(H, V)")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_float(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, got {tensor.dtype} and {query.dtype}")
    require_choice("feature_map", feature_map, ("elu1", "relu"))
    require_choice("direction", direction, ("bidirectional", "causal"))
    if direction == "causal" and not normalize:
        raise ValueError("normalize must be True when direction='causal': a prefix softmax has no fixed scale otherwise, got False")
    require_same_device(query=query, key=key, value=value, offsets=offsets)
    require_same_device(query=query, key_gate=key_gate, output_gate=output_gate, norm_weight=norm_weight)
    require_offsets(offsets, layout, num_tokens)
    if backend is Backend.TRITON:
        raise NotImplementedError("gated_linear_attention has no Triton kernel yet; pass backend=Backend.REFERENCE")
    return gated_linear_attention_reference(
        query, key, value, key_gate, output_gate, norm_weight, offsets, layout, feature_map, normalize, eps, direction
    )
