"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

from typing import Literal

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.checks import (
    eps_or_default,
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
from gbla_kernels.linear_attention.autograd import PackedWidths, attend, attend_packed
from gbla_kernels.linear_attention.launch_config import MAX_WIDTH, launch_config
from gbla_kernels.linear_attention.reference import gated_linear_attention_reference
from gbla_kernels.linear_attention.reference_op import reference_op
from gbla_kernels.row_splits import RowSplits

FeatureMap = Literal["elu1", "relu"]
Direction = Literal["bidirectional", "causal"]
TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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
    feature_map: FeatureMap = "elu1",
    normalize: bool = True,
    eps: float | None = None,
    direction: Direction = "bidirectional",
    backend: Backend,
) -> Tensor:
    """Gated bidirectional linear attention over a jagged batch; rows never see each other.

    ``y_t = RMSNorm(phi(q_t) S / (phi(q_t) . n)) * norm_weight * silu(output_gate_t)`` with ``S = sum_t a_t phi(k_t) v_t^T``,
    ``n = sum_t a_t phi(k_t)`` and ``a`` the softmax of ``key_gate`` over the row (arXiv 2606.07317; see this folder's README).

    The arithmetic is fp32 inside and rounds once, at each output; autocast changes nothing here: the op runs in the dtype of query,
    and gates and norm_weight may have any float dtype. Triton reads views of one fused projection without a copy.

    Args:
        query: ``(L, H, K)``, fp32, bf16, fp16 or (reference only) fp64; Triton: K and V up to 256.
        key: ``(L, H, K)``, dtype of query.
        value: ``(L, H, V)``, dtype of query.
        key_gate: ``(L, H)`` logits, any float dtype; ``-inf`` silences a token, ``+inf`` and NaN are not allowed. None weighs
            the tokens of a row equally.
        output_gate: ``(L, H, V)``, any float dtype, or None for no gate.
        norm_weight: ``(H, V)``, any float dtype, or None for no RMSNorm.
        offsets: ``(B + 1,)`` int64; row ``b`` is ``offsets[b]:offsets[b + 1]``, possibly empty.
        layout: the same rows with lengths on the host; without it the reference backend reads offsets (a device sync) and Triton
            makes its tables on the device, for the most rows and splits that L tokens can have.
        feature_map: ``elu1`` is ``x + 1`` above 0 and ``exp(x)`` below; ``relu``.
        normalize: divide by ``phi(q_t) . n``; a zero denominator gives 0 and zero gradients.
        eps: added to the mean square in RMSNorm, above 0; None is 1e-6.
        direction: ``causal`` lets token t see tokens <= t of its row; needs ``normalize=True``.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` needs CUDA and bidirectional attention, and never falls back.

    Returns:
        ``(L, H, V)`` in the dtype of value.

    Raises:
        ValueError: if shapes, dtypes or devices disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_backend(backend)
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
        require_float("output_gate", output_gate)
    if norm_weight is not None:
        require_shape("norm_weight", norm_weight, (num_heads, value_dim), "(H, V)")
        require_float("norm_weight", norm_weight)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_float(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, got {tensor.dtype} and {query.dtype}")
    require_choice("feature_map", feature_map, ("elu1", "relu"))
    require_choice("direction", direction, ("bidirectional", "causal"))
    if direction == "causal" and not normalize:
        raise ValueError("normalize must be True when direction='causal': a prefix softmax has no fixed scale otherwise, got False")
    require_tensor("offsets", offsets)
    require_same_device(query=query, key=key, value=value, offsets=offsets)
    require_same_device(query=query, key_gate=key_gate, output_gate=output_gate, norm_weight=norm_weight)
    require_offsets(offsets, layout, num_tokens)
    eps = eps_or_default(eps)
    if backend is Backend.TRITON:
        _require_triton("gated_linear_attention", query, key_dim, value_dim, direction)
        splits = _row_splits(offsets, layout, num_tokens, key_dim, value_dim, query.dtype)
        return attend(query, key, value, key_gate, output_gate, norm_weight, splits, feature_map, normalize, eps)
    if layout is not None and torch.compiler.is_compiling():
        settings = (feature_map, normalize, eps, direction)
        return reference_op(query, key, value, key_gate, output_gate, norm_weight, layout.offsets_cpu, *settings)
    return gated_linear_attention_reference(
        query, key, value, key_gate, output_gate, norm_weight, offsets, layout, feature_map, normalize, eps, direction
    )


def gated_linear_attention_packed(
    projection: Tensor,
    norm_weight: Tensor | None,
    offsets: Tensor,
    *,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    key_gate: bool = True,
    output_gate: bool = True,
    layout: JaggedLayout | None = None,
    feature_map: FeatureMap = "elu1",
    normalize: bool = True,
    eps: float | None = None,
    direction: Direction = "bidirectional",
    backend: Backend,
) -> Tensor:
    """``gated_linear_attention`` on one fused projection, whose gradient comes back as one tensor instead of five to concatenate.

    Args:
        projection: ``(L, columns)``: query ``H K``, key ``H K``, value ``H V``, output gate ``H V`` (if any), key gate ``H`` (if
            any), then padding columns, which get zero gradients.
        norm_weight: ``(H, V)``, any float dtype, or None for no RMSNorm.
        offsets: ``(B + 1,)`` int64, as in ``gated_linear_attention``, like all that follows.
        num_heads: ``H``.
        key_dim: ``K``.
        value_dim: ``V``.
        key_gate: whether the projection holds a key gate.
        output_gate: whether it holds an output gate.
        layout: the same rows with lengths on the host.
        feature_map: ``elu1`` or ``relu``.
        normalize: divide by ``phi(q_t) . n``.
        eps: added to the mean square in RMSNorm, above 0; None is 1e-6.
        direction: ``bidirectional`` or ``causal``.
        backend: ``REFERENCE`` or ``TRITON``.

    Returns:
        ``(L, H, V)`` in the dtype of projection.

    Raises:
        ValueError: if the projection has too few columns, or as ``gated_linear_attention``.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_backend(backend)
    require_dim("projection", projection, 2, "(L, columns)")
    require_float("projection", projection)
    widths = PackedWidths(num_heads, key_dim, value_dim, key_gate, output_gate)
    if projection.shape[1] < widths.num_columns:
        raise ValueError(f"projection must have at least {widths.num_columns} columns for {widths}, got shape {tuple(projection.shape)}")
    if backend is Backend.REFERENCE:
        x = widths.unpack(projection)
        return gated_linear_attention(
            *(x.query, x.key, x.value, x.key_gate, x.output_gate, norm_weight, offsets),
            layout=layout,
            feature_map=feature_map,
            normalize=normalize,
            eps=eps,
            direction=direction,
            backend=backend,
        )
    if norm_weight is not None:
        require_shape("norm_weight", norm_weight, (num_heads, value_dim), "(H, V)")
        require_float("norm_weight", norm_weight)
    require_choice("feature_map", feature_map, ("elu1", "relu"))
    require_choice("direction", direction, ("bidirectional", "causal"))
    require_tensor("offsets", offsets)
    require_same_device(projection=projection, norm_weight=norm_weight, offsets=offsets)
    require_offsets(offsets, layout, projection.shape[0])
    eps = eps_or_default(eps)
    _require_triton("gated_linear_attention_packed", projection, key_dim, value_dim, direction)
    splits = _row_splits(offsets, layout, projection.shape[0], key_dim, value_dim, projection.dtype)
    return attend_packed(projection, norm_weight, splits, widths, feature_map, normalize, eps)


def _require_triton(op: str, tensor: Tensor, key_dim: int, value_dim: int, direction: str) -> None:
    require_triton_device(op, tensor)
    cure = "pass backend=Backend.REFERENCE"
    if direction != "bidirectional":
        raise NotImplementedError(f"{op}: Triton has no direction={direction!r}; {cure}")
    if tensor.dtype not in TRITON_DTYPES:
        raise NotImplementedError(f"{op}: Triton has no kernel for {tensor.dtype}, only {TRITON_DTYPES}; {cure}")
    if max(key_dim, value_dim) > MAX_WIDTH:
        raise NotImplementedError(f"{op}: Triton has no kernel for K, V > {MAX_WIDTH}, got {(key_dim, value_dim)}; {cure}")


def _row_splits(
    offsets: Tensor, layout: JaggedLayout | None, num_tokens: int, key_dim: int, value_dim: int, dtype: torch.dtype
) -> RowSplits:
    """Tables of the layout, or made on the device; a state too large for one program has no path for short rows."""
    has_row_path = launch_config(int(key_dim), int(value_dim), dtype).num_key_blocks == 1
    if layout is not None:
        return layout.row_splits if has_row_path else layout.all_splits
    return RowSplits.on_device(offsets, num_tokens) if has_row_path else RowSplits.on_device(offsets, num_tokens, short_limit=0)
