"""Causal linear attention in plain PyTorch: rows of like length share their operations."""

# B rows, L tokens, T tokens of a row, W padded tokens, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

QUERY_BLOCK = 1024
"""Queries per block of a long row, whose form is quadratic: bounds its memory."""
SHORT_ROW = 16
"""Shorter rows are padded to this: the extra products cost less than a further group of launches."""
MAX_SCORES = 1 << 26
"""Scores of rows that are computed at once."""


def causal_rows(query: Tensor, key: Tensor, value: Tensor, logits: Tensor, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """In each row, token t sees tokens <= t: ``u_t = phi(q_t) S_t`` ``(L, H, V)`` and ``c_t = phi(q_t) . n_t`` ``(L, H)``.

    Several rows are padded to ``SHORT_ROW`` or the next power of two, and those of one padded length computed at once: their last bits
    depend on how many they are.

    Args:
        query: ``(L, H, K)``, already feature-mapped, like key.
        key: ``(L, H, K)``.
        value: ``(L, H, V)``.
        logits: ``(L, H)``, the key gate.
        lengths: of the rows, ``B`` of them, not all empty.
    """
    tensors = (query, key, value, logits)
    places, outputs, normalizers = [], [], []
    for padded, rows in _groups(lengths, query.shape[1]):
        tokens, is_real = _tokens(lengths, rows, padded)
        index = tokens.to(query.device)
        # its backward adds in place, where that of indexing sorts; the gradient of padding is zero
        padded_rows = (tensor.index_select(0, index.flatten()).unflatten(0, index.shape) for tensor in tensors)
        attended, normalizer = _causal(*padded_rows)
        kept = is_real.to(query.device)
        places.append(index[kept])
        outputs.append(attended[kept])
        normalizers.append(normalizer[kept])
    order = torch.cat(places).argsort()
    return torch.cat(outputs)[order], torch.cat(normalizers)[order]


def _groups(lengths: Sequence[int], num_heads: int) -> Iterator[tuple[int, list[int]]]:
    """Padded lengths ``W``, each with rows that are computed at once; a row beyond a block, or without others, is not padded."""
    if len(lengths) == 1:
        yield lengths[0], [0]
        return
    by_width: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length > QUERY_BLOCK:
            yield length, [row]
        elif length:
            by_width.setdefault(max(1 << (length - 1).bit_length(), SHORT_ROW), []).append(row)
    for width, rows in by_width.items():
        at_once = max(MAX_SCORES // (num_heads * width * width), 1)
        for first in range(0, len(rows), at_once):
            yield width, rows[first : first + at_once]


def _tokens(lengths: Sequence[int], rows: list[int], padded: int) -> tuple[Tensor, Tensor]:
    """Indices ``(rows, W)`` of the tokens, padded with each row's own last one, and which of them are not padding."""
    all_lengths = torch.tensor(lengths)
    chosen = all_lengths[rows]
    starts = (all_lengths.cumsum(0) - all_lengths)[rows]
    positions = torch.arange(padded)
    return starts[:, None] + positions.clamp(max=chosen[:, None] - 1), positions < chosen[:, None]


def _causal(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """``(rows, W, H, ...)`` each; padding comes last, where no token before it sees it.

    Each prefix is shifted by its own maximum, so a late large gate cannot push earlier prefixes into underflow.
    """
    logits = logits.movedim(1, -1)
    prefix_max = torch.cummax(logits.detach(), dim=-1).values
    prefix_max = prefix_max.masked_fill(prefix_max == -torch.inf, 0)
    outputs, normalizers = [], []
    num_tokens = query.shape[1]
    for start in range(0, num_tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, num_tokens)
        is_future = torch.ones(stop - start, stop, dtype=torch.bool, device=query.device).triu(diagonal=start + 1)
        exponent = (logits[..., None, :stop] - prefix_max[..., start:stop, None]).masked_fill(is_future, -torch.inf)
        score = torch.einsum("bthk,bshk->bhts", query[:, start:stop], key[:, :stop]) * torch.exp(exponent)
        outputs.append(torch.einsum("bhts,bshv->bthv", score, value[:, :stop]))
        normalizers.append(score.sum(dim=-1).movedim(1, -1))
    return torch.cat(outputs, dim=1), torch.cat(normalizers, dim=1)
