"""Softmax attention between two jagged batches of the same rows: no padding, no row sees another."""

# B rows, L tokens, H heads, K head width (docs/shapes.md); queries and keys may have different row lengths

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gbla_kernels import JaggedLayout


def jagged_attention(
    query: Tensor, key: Tensor, value: Tensor, query_layout: JaggedLayout, key_layout: JaggedLayout, *, is_causal: bool = False
) -> Tensor:
    """Each query attends to all keys of its row (or, if causal, to those up to its own position).

    Half precision on CUDA runs torch's fused variable-length kernel; everything else one fused call per row.

    Args:
        query: ``(L_query, H, K)``.
        key: ``(L_key, H, K)``.
        value: ``(L_key, H, K)``.
        query_layout: rows of the queries.
        key_layout: rows of keys and values: as many as queries have, of any lengths.
        is_causal: needs equal layouts.

    Returns:
        ``(L_query, H, K)``; a query whose row has no keys gets zeros.

    Raises:
        ValueError: if the layouts disagree in the number of rows.
    """
    if query_layout.num_rows != key_layout.num_rows:
        raise ValueError(f"query_layout and key_layout must have the same rows, got {query_layout.num_rows} and {key_layout.num_rows}")
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[0] and key.shape[0]:
        return _fused(query, key, value, query_layout, key_layout, is_causal)
    if not any(queries and keys for queries, keys in zip(query_layout.row_lengths, key_layout.row_lengths, strict=True)):
        # every operand stays in the graph, so gradients are zero and not None
        return query * 0 + (key.sum() + value.sum()) * 0
    outputs = []
    row_queries = query.split(query_layout.row_lengths)
    row_keys, row_values = key.split(key_layout.row_lengths), value.split(key_layout.row_lengths)
    for q, k, v in zip(row_queries, row_keys, row_values, strict=True):
        if q.shape[0] == 0 or k.shape[0] == 0:
            outputs.append(torch.zeros_like(q))
            continue
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
        outputs.append(attended[0].transpose(0, 1))
    return torch.cat(outputs)


def _fused(query: Tensor, key: Tensor, value: Tensor, query_layout: JaggedLayout, key_layout: JaggedLayout, is_causal: bool) -> Tensor:
    attended = varlen_attn(
        query,
        key,
        value,
        query_layout.offsets_int32,
        key_layout.offsets_int32,
        query_layout.max_length,
        key_layout.max_length,
        window_size=(-1, 0) if is_causal else (-1, -1),
    )
    assert isinstance(attended, Tensor)
    return attended
