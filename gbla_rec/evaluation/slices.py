"""Parts of the users that are looked at alone: by the length of the history, and by how often the target was trained on."""

# U users, S targets of all users, N items (docs/shapes.md)

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_SLICES = 8
"""Of edges that follow the data."""
MIN_SLICE_USERS = 50
"""Edges that follow the data leave at least so many users in a slice; an interval of fewer says little."""
Int64Array = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class UserSlice:
    """Users whose value lies in ``low .. high``, both included; ``high`` is None for the last slice.

    ``members`` ``(U,)`` bool says who they are.
    """

    low: int
    high: int | None
    members: NDArray[np.bool_]

    @property
    def label(self) -> str:
        """``8-15``, ``3`` or ``64+``."""
        if self.high is None:
            return f"{self.low}+"
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


def slices_at(values: Int64Array, edges: Sequence[int]) -> list[UserSlice]:
    """Divide users at ``edges``: each user is in exactly one slice, and a slice may be empty.

    Args:
        values: ``(U,)`` int64, not negative.
        edges: ascending and positive; each begins a slice, and the first slice begins at 0.

    Raises:
        ValueError: if the edges do not rise from above 0.
    """
    if any(low >= high for low, high in zip([0, *edges], edges, strict=False)):
        raise ValueError(f"edges must rise from above 0, got {list(edges)}")
    found = []
    for low, high in zip([0, *edges], [*edges, None], strict=True):
        members = values >= low if high is None else (values >= low) & (values < high)
        found.append(UserSlice(low, None if high is None else high - 1, members))
    return found


def logarithmic_edges(values: Int64Array) -> tuple[int, ...]:
    """Edges of slices that grow by a constant factor, fitted to ``values``.

    They are powers of the smallest power of two that gives at most ``MAX_SLICES`` slices; slices of fewer than
    ``MIN_SLICE_USERS`` users are joined with the shorter neighbour, the first one with the longer.

    Args:
        values: ``(U,)`` int64, positive.
    """
    if len(values) == 0:
        return ()
    low, high, factor = int(values.min()), int(values.max()), 2
    while len(edges := _powers(factor, low, high)) + 1 > MAX_SLICES:
        factor *= 2
    kept: list[int] = []
    end = high + 1
    for edge in reversed(edges):
        if np.count_nonzero((values >= edge) & (values < end)) >= MIN_SLICE_USERS:
            kept.insert(0, edge)
            end = edge
    if kept and np.count_nonzero(values < kept[0]) < MIN_SLICE_USERS:
        kept = kept[1:]
    return tuple(kept)


def rarest_target_events(targets: Int64Array, target_offsets: Int64Array, train_counts: Int64Array) -> Int64Array:
    """Training events of each user's rarest target; with one target a user, of the target.

    Args:
        targets: ``(S,)`` int64 item indices.
        target_offsets: ``(U + 1,)`` int64; every user has a target.
        train_counts: ``(N,)`` int64 training events of each item.

    Returns:
        ``(U,)`` int64.
    """
    if len(target_offsets) == 1:
        return np.zeros(0, np.int64)
    return np.asarray(np.minimum.reduceat(train_counts[targets], target_offsets[:-1]), dtype=np.int64)


def _powers(factor: int, low: int, high: int) -> list[int]:
    """Powers of ``factor`` in ``(low, high]``."""
    found, power = [], 1
    while power <= high:
        if power > low:
            found.append(power)
        power *= factor
    return found
