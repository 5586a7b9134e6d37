"""Recall and NDCG of ranked items, exact and per user."""

# U users, R ranked results per user, S targets of all users (docs/shapes.md)

import numpy as np
from numpy.typing import NDArray

NO_ITEM = -1
"""Padding of a ranking that has fewer than R items."""


def recall_at_k(
    ranked_items: NDArray[np.int64], target_items: NDArray[np.int64], target_offsets: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Share of a user's distinct targets among the first ``k`` ranked items.

    Args:
        ranked_items: ``(U, R)`` int64 item indices, best first, distinct within a row; -1 where a ranking has fewer.
        target_items: ``(S,)`` int64; a target listed twice counts once.
        target_offsets: ``(U + 1,)`` int64; user ``u`` has the targets ``target_offsets[u]:target_offsets[u + 1]``, at least one.
        k: cutoff, at most ``R``.

    Returns:
        ``(U,)`` float64 in [0, 1].

    Raises:
        ValueError: if shapes disagree, ``k`` exceeds ``R``, a ranking repeats an item, or a user has no target.
    """
    hits, num_targets = _hits(ranked_items, target_items, target_offsets, k)
    return np.asarray(hits.sum(axis=1) / num_targets, dtype=np.float64)


def ndcg_at_k(
    ranked_items: NDArray[np.int64], target_items: NDArray[np.int64], target_offsets: NDArray[np.int64], k: int
) -> NDArray[np.float64]:
    """Normalised discounted cumulative gain with binary relevance.

    The gain at 1-based position ``i`` is ``1 / log2(i + 1)``; the ideal ranking has ``min(k, distinct targets)`` hits at
    the top (Järvelin and Kekäläinen, 2002).

    Args:
        ranked_items: ``(U, R)`` int64 item indices, best first, distinct within a row; -1 where a ranking has fewer.
        target_items: ``(S,)`` int64; a target listed twice counts once.
        target_offsets: ``(U + 1,)`` int64; user ``u`` has the targets ``target_offsets[u]:target_offsets[u + 1]``, at least one.
        k: cutoff, at most ``R``.

    Returns:
        ``(U,)`` float64 in [0, 1].

    Raises:
        ValueError: if shapes disagree, ``k`` exceeds ``R``, a ranking repeats an item, or a user has no target.
    """
    hits, num_targets = _hits(ranked_items, target_items, target_offsets, k)
    discounts = 1.0 / np.log2(np.arange(2, k + 2, dtype=np.float64))
    ideal = np.cumsum(discounts)[np.minimum(num_targets, k) - 1]
    return np.asarray((hits * discounts).sum(axis=1) / ideal, dtype=np.float64)


def _hits(
    ranked_items: NDArray[np.int64], target_items: NDArray[np.int64], target_offsets: NDArray[np.int64], k: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which of the first ``k`` are targets ``(U, k)``, and the number of distinct targets ``(U,)``."""
    _check(ranked_items, target_items, target_offsets, k)
    num_users = len(target_offsets) - 1
    span = int(max(ranked_items.max(initial=0), target_items.max(initial=0))) + 1
    # one integer per (user, item), so that a single sorted search serves all users
    rows = np.arange(num_users, dtype=np.int64)
    pairs = np.unique(np.repeat(rows, np.diff(target_offsets)) * span + target_items)
    top = ranked_items[:, :k]
    hits = np.isin(rows[:, None] * span + top, pairs) & (top != NO_ITEM)
    return hits, np.bincount(pairs // span, minlength=num_users)


def _check(ranked_items: NDArray[np.int64], target_items: NDArray[np.int64], target_offsets: NDArray[np.int64], k: int) -> None:
    if ranked_items.ndim != 2 or target_offsets.shape != (len(ranked_items) + 1,):
        raise ValueError(
            f"target_offsets must have shape (U + 1,) for ranked_items (U, R), got {target_offsets.shape} and {ranked_items.shape}"
        )
    if target_offsets[0] != 0 or target_offsets[-1] != len(target_items):
        raise ValueError(
            f"target_offsets must go from 0 to the {len(target_items)} targets, got {target_offsets[0]} to {target_offsets[-1]}"
        )
    if not 1 <= k <= ranked_items.shape[1]:
        raise ValueError(f"k must lie in [1, R], got k={k} with R={ranked_items.shape[1]} ranked items per user; rank at least k items")
    without = np.flatnonzero(np.diff(target_offsets) <= 0)
    if len(without):
        raise ValueError(f"every user needs at least one target, user {without[0]} has none; leave such users out")
    if ranked_items.min(initial=0) < NO_ITEM or target_items.min(initial=0) < 0:
        raise ValueError("ranked_items must be item indices or -1 and target_items item indices, got a smaller value")
    in_order = np.sort(ranked_items, axis=1)
    repeated = np.flatnonzero(((in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] != NO_ITEM)).any(axis=1))
    if len(repeated):
        raise ValueError(
            f"ranked_items must not repeat an item, the ranking of user {repeated[0]} does: {ranked_items[repeated[0]].tolist()}"
        )
