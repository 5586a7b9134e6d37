"""The public op: validation, then the backend that the caller chose."""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.checks import require_backend, require_dim, require_float, require_layout, require_same_device, require_shape
from gbla_kernels.cross_attention.autograd import attend, attend_packed
from gbla_kernels.cross_attention.launch_config import MAX_WIDTH, launch_config
from gbla_kernels.cross_attention.reference import jagged_cross_attention_reference
from gbla_kernels.cross_attention.row_pairs import RowPairs
from gbla_kernels.dispatch import is_traced, require_triton_device
from gbla_kernels.layout import JaggedLayout


def jagged_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_layout: JaggedLayout,
    key_layout: JaggedLayout,
    *,
    scale: float | None = None,
    backend: Backend,
) -> Tensor:
    """Softmax attention of each query over all keys of its row; made for few queries and very many keys.

    ``o_t = sum_s softmax_s(scale q_t . k_s) v_s`` over the tokens ``s`` of the row (see this folder's README).

    Args:
        query: ``(L_query, H, K)``, fp32, bf16 or fp16; the reference also takes fp64.
        key: ``(L_key, H, K)``, dtype of query; may be a view of a larger projection, which is not copied.
        value: ``(L_key, H, V)``, likewise.
        query_layout: rows of the queries, on their device.
        key_layout: rows of keys and values: as many as queries have, of any lengths.
        scale: of the scores; None is ``K ** -0.5``.
        backend: ``REFERENCE`` runs anywhere; ``TRITON`` never falls back.

    Returns:
        ``(L_query, H, V)`` in the dtype of value; a query whose row has no keys gets zeros, and a zero gradient. Autocast changes
        nothing.

    Raises:
        ValueError: if shapes, dtypes, devices or layouts disagree; the message names the argument and both values.
        NotImplementedError: if the backend lacks what is asked for.
    """
    require_backend(backend)
    scale = _validate(query, key, value, query_layout, key_layout, scale)
    if backend is Backend.REFERENCE:
        return jagged_cross_attention_reference(query, key, value, query_layout, key_layout, scale)
    _require_kernels(query, value)
    query, key, value = (tensor if tensor.stride(2) == 1 else tensor.contiguous() for tensor in (query, key, value))
    traced = is_traced(query, key, value)
    config = launch_config(int(query.shape[2]), int(value.shape[2]), query.dtype)
    rows = RowPairs.from_layouts(query_layout, key_layout, config, is_traced=traced)
    return attend(query, key, value, rows, scale, is_traced=traced)


def jagged_cross_attention_packed(
    query: Tensor,
    key_value: Tensor,
    query_layout: JaggedLayout,
    key_layout: JaggedLayout,
    *,
    scale: float | None = None,
    backend: Backend,
) -> Tensor:
    """``jagged_cross_attention`` on one projection of keys and values: its gradient is written once, not joined from two.

    Args:
        query: ``(L_query, H, K)``.
        key_value: ``(L_key, 2, H, K)``: keys, then values.
        query_layout: see ``jagged_cross_attention``, also for what is returned and refused.
        key_layout: likewise.
        scale: likewise.
        backend: likewise.
    """
    require_backend(backend)
    require_dim("key_value", key_value, 4, "(L_key, 2, H, K)")
    require_shape("key_value", key_value, (key_value.shape[0], 2, *key_value.shape[2:]), "(L_key, 2, H, K)")
    require_float("key_value", key_value)
    key, value = key_value.unbind(1)
    if backend is Backend.REFERENCE or is_traced(query, key_value):
        # a compiler joins the gradients
        return jagged_cross_attention(query, key, value, query_layout, key_layout, scale=scale, backend=backend)
    scale = _validate(query, key, value, query_layout, key_layout, scale)
    _require_kernels(query, value)
    query, key_value = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (query, key_value))
    config = launch_config(query.shape[2], query.shape[2], query.dtype)
    return attend_packed(query, key_value, RowPairs.from_layouts(query_layout, key_layout, config, is_traced=False), scale)


def _validate(
    query: Tensor, key: Tensor, value: Tensor, query_layout: JaggedLayout, key_layout: JaggedLayout, scale: float | None
) -> float:
    """The scale of the scores; raises ValueError for arguments that disagree."""
    require_dim("query", query, 3, "(L_query, H, K)")
    require_dim("value", value, 3, "(L_key, H, V)")
    num_heads, key_dim = query.shape[1:]
    require_shape("key", key, (value.shape[0], num_heads, key_dim), "(L_key, H, K)")
    require_shape("value", value, (value.shape[0], num_heads, value.shape[2]), "(L_key, H, V)")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        require_float(name, tensor)
        if tensor.dtype != query.dtype:
            raise ValueError(f"{name} must have the dtype of query, got {tensor.dtype} and {query.dtype}")
    require_layout("query_layout", query_layout)
    require_layout("key_layout", key_layout)
    require_same_device(query=query, key=key, value=value, query_layout=query_layout.offsets, key_layout=key_layout.offsets)
    if query_layout.num_rows != key_layout.num_rows:
        raise ValueError(f"query_layout and key_layout must have the same rows, got {query_layout.num_rows} and {key_layout.num_rows}")
    for name, tensor, layout in (("query", query, query_layout), ("key", key, key_layout)):
        if tensor.shape[0] != layout.num_tokens:
            raise ValueError(f"{name}_layout must have the tokens of {name}, got {layout.num_tokens} and {tensor.shape[0]}")
    return int(key_dim) ** -0.5 if scale is None else scale


def _require_kernels(query: Tensor, value: Tensor) -> None:
    require_triton_device("jagged_cross_attention", query)
    if query.dtype == torch.float64:
        raise NotImplementedError("jagged_cross_attention computes in fp32 on Triton, got fp64; pass backend=Backend.REFERENCE")
    if max(query.shape[2], value.shape[2]) > MAX_WIDTH:
        widths = f"K = {query.shape[2]}, V = {value.shape[2]}"
        raise NotImplementedError(f"jagged_cross_attention has Triton kernels up to K = V = {MAX_WIDTH}, got {widths}")
