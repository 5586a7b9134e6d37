"""Ranking by the item-level head: over the whole catalogue, or among the items that beam search found."""

# U users (rows of a batch), N items, R results per user, D model width (docs/shapes.md)

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gbla_rec.retrieval.beam_search import BeamResult, ranking_keys

SCORES_AT_ONCE = 1 << 27
"""Scores, or elements of candidates' vectors, of a block of users: bounds the memory for any catalogue and batch."""


@torch.no_grad()
def rank_catalogue(
    queries: Tensor,
    vectors: Tensor,
    *,
    num_results: int,
    denied_items: Tensor | None = None,
    denied_offsets: Tensor | None = None,
) -> BeamResult:
    """The items of the largest products with each query, the whole catalogue scored.

    Args:
        queries: ``(U, D)``.
        vectors: ``(N, D)``.
        num_results: ``R``.
        denied_items: item indices never to return, jagged over users by ``denied_offsets`` ``(U + 1,)``.
        denied_offsets: see ``denied_items``.

    Returns:
        Items ``(U, R)``, -1 where fewer exist, and their scores in fp32; ties by ascending item index.

    Raises:
        ValueError: if a score is NaN.
    """
    num_users, num_items = len(queries), len(vectors)
    queries, vectors = queries.float(), vectors.float()
    block = max(SCORES_AT_ONCE // max(num_items, 1), 1)
    parts = []
    for first in range(0, num_users, block):
        with _fp32(queries):
            scores = queries[first : first + block] @ vectors.T
        if denied_items is not None and denied_offsets is not None:
            offsets = denied_offsets[first : first + len(scores) + 1]
            rows = torch.repeat_interleave(offsets.diff())
            denied = denied_items[offsets[0] : offsets[-1]]
            scores[rows, denied] = -torch.inf
        parts.append(_best(torch.arange(num_items, device=scores.device).expand_as(scores), scores, num_results))
    if not parts:
        return _best(torch.empty((0, 0), dtype=torch.int64, device=queries.device), queries.new_empty((0, 0)).float(), num_results)
    return BeamResult(torch.cat([part.items for part in parts]), torch.cat([part.scores for part in parts]))


@torch.no_grad()
def rank_candidates(queries: Tensor, vectors: Tensor, beams: BeamResult, *, beam_weight: float, num_results: int) -> BeamResult:
    """Rank the items of a beam search by ``query . item + beam_weight * log-probability of the semantic ID``.

    Items that share a semantic ID have one log-probability; the item-level score tells them apart.

    Args:
        queries: ``(U, D)``.
        vectors: ``(N, D)``.
        beams: candidates ``(U, n)`` of each user, -1 where there are fewer, and their log-probabilities.
        beam_weight: 0 ranks by the item-level score alone.
        num_results: ``R``.

    Returns:
        Items ``(U, R)``, -1 where fewer exist, and their scores in fp32; ties by ascending item index.

    Raises:
        ValueError: if a score is NaN.
    """
    found = beams.items >= 0
    block = max(SCORES_AT_ONCE // max(beams.items.shape[1] * vectors.shape[1], 1), 1)
    with _fp32(queries):
        products = [
            torch.einsum("ud,und->un", some_queries.float(), vectors[some_items].float())
            for some_queries, some_items in zip(queries.split(block), beams.items.clamp(min=0).split(block), strict=True)
        ]
    scores = torch.cat(products)
    # a candidate of probability zero is the last, not NaN
    likely = beams.scores.clamp(min=torch.finfo(torch.float32).min / 4) * beam_weight if beam_weight else 0.0
    scores = (scores + likely).masked_fill(~found, -torch.inf)
    by_item = beams.items.argsort(dim=1)
    return _best(beams.items.gather(1, by_item), scores.gather(1, by_item), num_results)


def _fp32(x: Tensor) -> AbstractContextManager[object]:
    """No autocast: scores rounded to bf16 would tie items that differ, and ties go by index."""
    return torch.autocast(x.device.type, enabled=False)


def _best(items: Tensor, scores: Tensor, num_results: int) -> BeamResult:
    """The ``num_results`` best columns; a score of -inf is no result. Equal scores keep the order of the columns."""
    if bool(scores.isnan().any()):
        raise ValueError("queries and vectors must give no score NaN, got NaN: look for diverged weights or inputs")
    kept = min(num_results, scores.shape[1])
    # + 0.0: of equal scores, -0.0 would rank below 0.0
    places = torch.topk(ranking_keys(scores + 0.0, scores > -torch.inf), kept, dim=1).indices
    top = scores.gather(1, places)
    result_items = torch.full((len(scores), num_results), -1, dtype=torch.int64, device=scores.device)
    result_scores = torch.full((len(scores), num_results), -torch.inf, device=scores.device)
    result_items[:, :kept] = items.gather(1, places).masked_fill(top == -torch.inf, -1)
    result_scores[:, :kept] = top
    return BeamResult(result_items, result_scores)
