"""``varlen_linear_attention`` of fla-org/flash-bidirectional-linear-attention (MIT), where it is installed, bare and with equal work.

It maps no features and has neither gates nor a norm. For equal work these are added around it under ``torch.compile``.
"""

# B rows, L tokens, T tokens of one row, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from plain_attention import gated_norm, phi
from row_lengths import Case
from torch import Tensor


def bare(case: Case, offsets: Tensor) -> Callable[..., Tensor]:
    """``op(query, key, value)`` on feature-mapped queries and keys, ``(L, H, K)``.

    Raises:
        ImportError: if the package is not installed.
    """
    from flash_bla.ops.linear_attn.varlen import varlen_linear_attention

    row_ends, longest = offsets.to(torch.int32), max(case.lengths)

    def op(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        return varlen_linear_attention(query, key, value, row_ends, longest)

    return op


def equal_work(case: Case, offsets: Tensor) -> Callable[..., Tensor]:
    """The same function as ``gated_linear_attention``, for rows of one length.

    Raises:
        ImportError: if the package is not installed.
        ValueError: if the rows are not equally long.
    """
    if not case.is_uniform:
        raise ValueError(f"equal work is written for rows of one length, got {case.name}")
    attend = bare(case, offsets)
    num_rows, length = len(case.lengths), case.lengths[0]

    @torch.compile(fullgraph=True, dynamic=False)
    def before(query: Tensor, key: Tensor, key_gate: Tensor) -> tuple[Tensor, Tensor]:
        gates = key_gate.float().view(num_rows, length, -1)
        # times T: it divides the state by the row length
        weight = torch.softmax(gates, dim=1).flatten(0, 1) * length
        return phi(query), (phi(key) * weight[..., None]).to(key.dtype)

    after = torch.compile(gated_norm, fullgraph=True, dynamic=False)

    def op(query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor, output_gate: Tensor, norm_weight: Tensor) -> Tensor:
        mapped_query, mapped_key = before(query, key, key_gate)
        return after(attend(mapped_query, mapped_key, value.contiguous()), output_gate, norm_weight)

    return op


def mapped(tensor: Tensor) -> Tensor:
    """A contiguous, feature-mapped leaf: what the bare op wants to be given."""
    return F.elu(tensor.detach().float()).add(1).to(tensor.dtype).contiguous().requires_grad_()
