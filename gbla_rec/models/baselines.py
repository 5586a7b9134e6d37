"""Two baselines without training steps: the most popular items, and item-based nearest neighbours."""

# U users, N items, R results per user (docs/shapes.md)

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

Int64Array = NDArray[np.int64]
NO_ITEM = -1
MAX_PRODUCTS_AT_ONCE = 20_000_000
"""Multiply-adds of one sparse product, which also bounds its non-zeros: blocks keep the memory flat for any N and U."""


class MostPopular:
    """Ranks all items by their number of training events.

    Args:
        train_events: one ``(offsets (U + 1,), items (E,))`` int64 pair per shard.
        num_items: N.

    Raises:
        ValueError: if an item index is outside ``[0, num_items)``.
    """

    def __init__(self, train_events: Iterable[tuple[Int64Array, Int64Array]], num_items: int) -> None:
        counts = np.zeros(num_items, np.int64)
        for offsets, items in train_events:
            _check_jagged("train_events", offsets, items, num_items)
            counts += np.bincount(items, minlength=num_items)
        self.num_items = num_items
        # stable: ties by ascending item index
        self._order = np.argsort(-counts, kind="stable")
        self._place = np.empty(num_items, np.int64)
        self._place[self._order] = np.arange(num_items)

    def rank(self, seen_items: Int64Array, seen_offsets: Int64Array, num_results: int, *, exclude_seen: bool) -> Int64Array:
        """The most popular items, the same for everyone except for what a user has seen.

        Args:
            seen_items: ``(Q,)`` int64, each user's history, oldest first.
            seen_offsets: ``(U + 1,)`` int64.
            num_results: R.
            exclude_seen: leave out the items of the user's own history.

        Returns:
            ``(U, R)`` int64, best first, ties by ascending item index; -1 where the catalogue is used up.

        Raises:
            ValueError: if offsets or item indices are out of range.
        """
        _check_jagged("seen_items", seen_offsets, seen_items, self.num_items)
        num_users = len(seen_offsets) - 1
        places = np.tile(np.arange(num_results, dtype=np.int64), (num_users, 1))
        if exclude_seen and num_users > 0:
            # distinct seen places s_0 < s_1 < ... of a user: s_j - j unseen items come before s_j, so the r-th unseen
            # item stands at r + |{j : s_j - j <= r}|
            span = self.num_items + 1
            rows = np.arange(num_users, dtype=np.int64)
            seen = np.unique(np.repeat(rows, np.diff(seen_offsets)) * span + self._place[seen_items])
            first = np.searchsorted(seen, np.arange(num_users + 1, dtype=np.int64) * span)
            unseen_before = seen - (np.arange(len(seen)) - np.repeat(first[:-1], np.diff(first)))
            queries = np.minimum(places, self.num_items - 1) + rows[:, None] * span
            places += np.searchsorted(unseen_before, queries, side="right") - first[:-1, None]
        return np.where(places < self.num_items, self._order[np.minimum(places, self.num_items - 1)], NO_ITEM)


class ItemKNN:
    """Item-based nearest neighbours: the cosine of two items' user sets (Sarwar et al., 2001).

    ``similarity(i, j) = users of both / sqrt(users of i * users of j)``; each item keeps its ``num_neighbours`` most
    similar ones. A user's score of item ``j`` is the sum of ``recency_decay ** age * similarity(i, j)`` over the items
    ``i`` of the history, ``age`` counting from 0 at the last event.

    Args:
        train_events: one ``(offsets (U + 1,), items (E,))`` int64 pair per shard, oldest event first.
        num_items: N.
        num_neighbours: neighbours kept per item.
        recency_decay: in (0, 1]; 1 weighs the whole history equally. 0.8 was better than 1 on the validation targets of
            MovieLens small and of Amazon Beauty and Sports (Recall@10 +15 % to +19 %), so the baseline is given it.
        max_history_length: only so many most recent events of a user count, in training and in ranking; bounds the cost.

    Raises:
        ValueError: if an argument or an item index is out of range.
    """

    def __init__(
        self,
        train_events: Iterable[tuple[Int64Array, Int64Array]],
        num_items: int,
        *,
        num_neighbours: int = 100,
        recency_decay: float = 0.8,
        max_history_length: int = 1_000,
    ) -> None:
        if num_neighbours < 1 or max_history_length < 1:
            raise ValueError(f"num_neighbours and max_history_length must be positive, got {num_neighbours} and {max_history_length}")
        if not 0 < recency_decay <= 1:
            raise ValueError(f"recency_decay must lie in (0, 1], got {recency_decay}")
        self.num_items = num_items
        self.recency_decay = recency_decay
        self.max_history_length = max_history_length
        self._similarity = _nearest_neighbours(self._users_by_items(train_events), num_neighbours)

    def rank(self, seen_items: Int64Array, seen_offsets: Int64Array, num_results: int, *, exclude_seen: bool) -> Int64Array:
        """The items most similar to a user's history.

        Args:
            seen_items: ``(Q,)`` int64, each user's history, oldest first.
            seen_offsets: ``(U + 1,)`` int64.
            num_results: R.
            exclude_seen: leave out the items of the user's own history.

        Returns:
            ``(U, R)`` int64, best first, ties by ascending item index; -1 where no further item resembles the history.

        Raises:
            ValueError: if offsets or item indices are out of range.
        """
        _check_jagged("seen_items", seen_offsets, seen_items, self.num_items)
        history = self._weighted_histories(seen_items, seen_offsets)
        seen = _binary_matrix(seen_items, seen_offsets, self.num_items)
        ranked = np.full((len(seen_offsets) - 1, num_results), NO_ITEM, np.int64)
        for start, stop in _blocks_of_rows(history, self._similarity):
            scores = history[start:stop] @ self._similarity
            if exclude_seen:
                scores = scores - scores.multiply(seen[start:stop])
            rows, places, items, _ = _top_entries(scores, num_results)
            ranked[start + rows, places] = items
        return ranked

    def _users_by_items(self, train_events: Iterable[tuple[Int64Array, Int64Array]]) -> Any:
        parts = [sp.csr_matrix((0, self.num_items))]
        for offsets, items in train_events:
            _check_jagged("train_events", offsets, items, self.num_items)
            recent = _ages(offsets) < self.max_history_length
            parts.append(_binary_matrix(items[recent], _offsets(np.minimum(np.diff(offsets), self.max_history_length)), self.num_items))
        return sp.vstack(parts, format="csr")

    def _weighted_histories(self, items: Int64Array, offsets: Int64Array) -> Any:
        """``(U, N)``: the weight of an item's last occurrence among the recent events."""
        ages = _ages(offsets)
        recent = np.flatnonzero(ages < self.max_history_length)
        rows = np.repeat(np.arange(len(offsets) - 1, dtype=np.int64), np.diff(offsets))[recent]
        # the first of a repeated key that np.unique reports, in the reversed array, is the last occurrence
        keys, from_end = np.unique((rows * self.num_items + items[recent])[::-1], return_index=True)
        weights = self.recency_decay ** ages[recent][::-1][from_end].astype(np.float64)
        lengths = np.bincount(keys // self.num_items, minlength=len(offsets) - 1)
        return sp.csr_matrix((weights, keys % self.num_items, _offsets(lengths)), shape=(len(lengths), self.num_items))


def _nearest_neighbours(users_by_items: Any, num_neighbours: int) -> Any:
    """``(N, N)`` sparse cosine similarities, ``num_neighbours`` a row, zero on the diagonal."""
    num_items = users_by_items.shape[1]
    num_users = np.bincount(users_by_items.indices, minlength=num_items).astype(np.float64)
    items_by_users = users_by_items.T.tocsr()
    neighbours = [sp.csr_matrix((0, num_items))]
    for start, stop in _blocks_of_rows(items_by_users, users_by_items):
        similarity = (items_by_users[start:stop] @ users_by_items).tocoo()
        # integer counts are divided once, so that equal cosines are equal floats
        similarity.data /= np.sqrt(num_users[start + similarity.row] * num_users[similarity.col])
        similarity.data[start + similarity.row == similarity.col] = 0.0
        rows, _, items, values = _top_entries(similarity, num_neighbours)
        neighbours.append(sp.csr_matrix((values, (rows, items)), shape=(stop - start, num_items)))
    return sp.vstack(neighbours, format="csr")


def _top_entries(scores: Any, count: int) -> tuple[Int64Array, Int64Array, Int64Array, NDArray[np.float64]]:
    """The ``count`` largest positive entries of each row of a sparse matrix, by falling value, then ascending column.

    Values are compared in fp32, so that sums which differ by fp64 rounding alone are ties.

    Returns:
        Row, place within the row, column, value of each entry, row by row.
    """
    entries = scores.tocoo()
    positive = entries.data > 0
    rows, columns, values = entries.row[positive].astype(np.int64), entries.col[positive].astype(np.int64), entries.data[positive]
    # the bits of positive floats sort as the floats do: one integer sort replaces a sort per row
    falling = np.uint64(0xFFFFFFFF) - values.astype(np.float32).view(np.uint32)
    keys = (rows.astype(np.uint64) << np.uint64(32)) | falling
    ends = np.cumsum(np.bincount(rows, minlength=scores.shape[0]))
    starts = np.concatenate([[0], ends[:-1]])
    last_kept = np.sort(keys)[np.maximum(np.minimum(starts + count, ends) - 1, 0)] if len(keys) else keys
    kept = np.flatnonzero(keys <= last_kept[rows])
    kept = kept[np.lexsort((columns[kept], keys[kept]))]
    kept_rows = rows[kept]
    places = np.arange(len(kept)) - np.searchsorted(kept_rows, kept_rows)
    # ties at the last place can bring more than count
    kept, places = kept[places < count], places[places < count]
    return rows[kept], places, columns[kept], values[kept]


def _blocks_of_rows(left: Any, right: Any) -> Iterator[tuple[int, int]]:
    """Ranges of rows of ``left`` whose product with ``right`` stays within ``MAX_PRODUCTS_AT_ONCE``, one row at least."""
    per_entry = np.diff(right.indptr)[left.indices]
    done = np.concatenate([[0], np.cumsum(per_entry, dtype=np.int64)])[left.indptr]
    start = 0
    while start < left.shape[0]:
        stop = max(start + 1, int(np.searchsorted(done, done[start] + MAX_PRODUCTS_AT_ONCE, side="right")) - 1)
        yield start, stop
        start = stop


def _binary_matrix(items: Int64Array, offsets: Int64Array, num_items: int) -> Any:
    matrix = sp.csr_matrix((np.ones(len(items)), items, offsets), shape=(len(offsets) - 1, num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1.0
    return matrix


def _ages(offsets: Int64Array) -> Int64Array:
    """Of each event: how many events of its user follow."""
    return np.repeat(offsets[1:], np.diff(offsets)) - 1 - np.arange(offsets[-1])


def _offsets(lengths: Int64Array) -> Int64Array:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _check_jagged(name: str, offsets: Int64Array, items: Int64Array, num_items: int) -> None:
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"the offsets of {name} must rise from 0 to its {len(items)} items, got {offsets[:3].tolist()} ... {offsets[-1:].tolist()}"
        )
    if len(items) and not (0 <= items.min() and items.max() < num_items):
        raise ValueError(f"{name} must hold item indices in [0, {num_items}), got {items.min()} to {items.max()}")
