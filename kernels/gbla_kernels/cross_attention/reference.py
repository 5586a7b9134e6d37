"""The op in plain PyTorch: exact, differentiable, and the truth that every kernel is tested against."""

# B rows, L tokens, T tokens of one row, H heads, K key width, V value width (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.layout import JaggedLayout


def attend_row(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One row: ``(T_query, H, V)``, and zeros if it has no keys."""
    if key.shape[0] == 0:
        return query.new_zeros(*query.shape[:2], value.shape[2])
    weight = torch.softmax(torch.einsum("thk,shk->hts", query, key) * scale, dim=-1)
    return torch.einsum("hts,shv->thv", weight, value)


def jagged_cross_attention_reference(
    query: Tensor, key: Tensor, value: Tensor, query_layout: JaggedLayout, key_layout: JaggedLayout, scale: float
) -> Tensor:
    """See ``gbla_kernels.jagged_cross_attention``. Half precision is computed in fp32 and rounded once, at the output.

    Rows are computed one by one, so a row's result is bit-identical whoever shares its batch.
    """
    compute = torch.promote_types(value.dtype, torch.float32)
    queries = query.to(compute).split(query_layout.row_lengths)
    keys, values = key.to(compute).split(key_layout.row_lengths), value.to(compute).split(key_layout.row_lengths)
    # autocast would round the products' inputs to half precision
    with torch.autocast(value.device.type, enabled=False):
        rows = [attend_row(q, k, v, scale) for q, k, v in zip(queries, keys, values, strict=True) if q.shape[0] > 0]
    # every input stays in the graph, so gradients are zero and not None
    nothing = (query[:0].sum() + key[:0].sum() + value[:0].sum()).to(compute)
    output = torch.cat(rows) if rows else query.new_zeros(0, query.shape[1], value.shape[2])
    return (output + nothing).to(value.dtype)
