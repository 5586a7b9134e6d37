"""Softmax attention where all rows have one length: cuDNN's dense kernel, which torch calls by itself."""

# B rows, L tokens, T tokens of a row, H heads, K head width (docs/shapes.md)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SHORT_ROWS = 256
"""Tokens of a row up to which cuDNN is not worth it: there is little to compute, and the blocks of torch's own kernel start faster."""
LENGTH_MULTIPLE = 128
"""Lengths for the dense kernel: torch makes a plan for each, so that arbitrary ones would make many."""


def is_dense_length(length: int) -> bool:
    """True if a batch whose rows all have ``length`` tokens is given to the dense kernel."""
    return length > SHORT_ROWS and length % LENGTH_MULTIPLE == 0


def dense_length(offsets_cpu: Tensor) -> int:
    """``T`` if all rows of ``offsets_cpu (B + 1,)`` have ``T`` tokens and the dense kernel takes such, else 0."""
    lengths = offsets_cpu.diff()
    length = int(lengths[0]) if lengths.numel() else 0
    return length if is_dense_length(length) and bool((lengths == length).all()) else 0


def attend_dense(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    """Attention ``(L, H, K)`` inside rows of ``length`` tokens, for autograd; query, key and value are ``(L, H, K)``."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = F.scaled_dot_product_attention(_rows(query, length), _rows(key, length), _rows(value, length))
    return _tokens(attended)


def dense_forward(query: Tensor, key: Tensor, value: Tensor, length: int, *, with_stats: bool) -> tuple[Tensor, Tensor]:
    """The same without autograd: output ``(L, H, K)`` contiguous, and the logarithms of the softmax sums ``(L, H)`` fp32, or empty."""
    rows = (_rows(query, length), _rows(key, length), _rows(value, length))
    out, stats, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*rows, None, with_stats)
    own_stats = _tokens(stats.view(stats.shape[:3])).contiguous() if with_stats else query.new_empty(0, dtype=torch.float32)
    return _tokens(out).contiguous(), own_stats


def dense_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients ``(L, H, K)``, contiguous, of query, key and value from what ``dense_forward`` returned and its gradient."""
    rows = (_rows(x, length) for x in (d_out, query, key, value, out))
    stats = _rows(stats, length).contiguous().unsqueeze(-1)
    # of dropout, which is off
    unused = torch.empty((), dtype=torch.int64, device=query.device)
    gradients = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        *(*rows, stats, unused, unused, None, None, None, length, length, 0.0, False)
    )
    d_query, d_key, d_value = (_tokens(x).contiguous() for x in gradients)
    return d_query, d_key, d_value


def _rows(x: Tensor, length: int) -> Tensor:
    """``(L, H, ...)`` as ``(B, H, T, ...)``, a view unless the elements of a head are apart, which cuDNN does not take."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    return x.view(-1, length, *x.shape[1:]).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """``(B, H, T, ...)`` as ``(L, H, ...)``."""
    return x.transpose(1, 2).flatten(0, 1)
