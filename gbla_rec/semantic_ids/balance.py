"""Assignments that spread items evenly over codes: a capacity for each code, and distinct last codes under one prefix.

Shapes: ``n`` vectors, ``F`` features, ``k`` centroids. Capacities are met by deferred acceptance (Gale and Shapley, 1962): each
vector asks for its nearest centroid that would take it, and a full centroid keeps the nearest ones. Distinct codes under a
prefix are the cheapest matching (scipy's ``linear_sum_assignment``). Both are deterministic.
"""

import math

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_array

BLOCK = 65_536
MAX_REFINEMENTS = 10


def capacity_of(num_vectors: int, num_centroids: int, balance: float) -> int:
    """Most vectors of one centroid: ``balance`` times the even share, rounded up (so that there is room for all)."""
    return math.ceil(balance * num_vectors / num_centroids)


def squared_distances(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float64]:
    """``(n, k)`` fp64, up to a constant of each row."""
    wide = centroids.astype(np.float64)
    distances: NDArray[np.float64] = np.square(wide).sum(axis=1) - 2.0 * (vectors.astype(np.float64) @ wide.T)
    return distances


def assign_with_capacity(vectors: NDArray[np.float32], centroids: NDArray[np.float32], capacity: int) -> NDArray[np.int64]:
    """The centroid of each vector, none with more than ``capacity`` vectors.

    The assignment is stable: a vector is refused by each centroid nearer than its own, because that one is full of vectors as near
    or nearer to it.

    Args:
        vectors: ``(n, F)`` fp32.
        centroids: ``(k, F)`` fp32.
        capacity: at least ``n / k``.

    Returns:
        ``(n,)`` int64 in ``[0, k)``.

    Raises:
        ValueError: if there is no room for all vectors.
    """
    num_vectors, num_centroids = len(vectors), len(centroids)
    if capacity * num_centroids < num_vectors:
        raise ValueError(f"capacity must be at least {num_vectors} / {num_centroids} for every vector to find room, got {capacity}")
    codes = np.full(num_vectors, -1, dtype=np.int64)
    distance = np.zeros(num_vectors)
    # the distance from which on a centroid takes no further vector: it only ever falls, so a refusal is final
    threshold = np.full(num_centroids, np.inf)
    offset = np.square(vectors, dtype=np.float64).sum(axis=1)
    asking = np.arange(num_vectors)
    while len(asking):
        for begin in range(0, len(asking), BLOCK):
            block = asking[begin : begin + BLOCK]
            distances = squared_distances(vectors[block], centroids) + offset[block, None]
            distances[distances >= threshold] = np.inf
            codes[block] = np.argmin(distances, axis=1)
            distance[block] = distances[np.arange(len(block)), codes[block]]
        asking = _refuse_beyond(codes, distance, threshold, capacity)
    return codes


def _refuse_beyond(
    codes: NDArray[np.int64], distance: NDArray[np.float64], threshold: NDArray[np.float64], capacity: int
) -> NDArray[np.int64]:
    """The vectors that their centroids cannot keep; lowers ``threshold`` of the full ones in place."""
    order = np.lexsort((distance, codes))
    counts = np.bincount(codes, minlength=len(threshold))
    starts = np.cumsum(counts) - counts
    rank = np.empty(len(codes), dtype=np.int64)
    rank[order] = np.arange(len(codes)) - starts[codes[order]]
    full = np.flatnonzero(counts >= capacity)
    threshold[full] = distance[order[starts[full] + capacity - 1]]
    return np.flatnonzero(rank >= capacity)


def balanced_centroids(vectors: NDArray[np.float32], centroids: NDArray[np.float32], capacity: int) -> NDArray[np.float32]:
    """Lloyd's algorithm with ``assign_with_capacity`` from ``centroids`` ``(k, F)``; a centroid without vectors stays."""
    codes = assign_with_capacity(vectors, centroids, capacity)
    for _ in range(MAX_REFINEMENTS):
        counts = np.bincount(codes, minlength=len(centroids))
        members = csr_array((np.ones(len(codes)), (codes, np.arange(len(codes)))), shape=(len(centroids), len(codes)))
        sums = members @ vectors.astype(np.float64)
        centroids = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids).astype(np.float32)
        before, codes = codes, assign_with_capacity(vectors, centroids, capacity)
        if np.array_equal(before, codes):
            break
    return centroids


def distinct_last_codes(vectors: NDArray[np.float32], centroids: NDArray[np.float32], prefixes: NDArray[np.int64]) -> NDArray[np.int64]:
    """The centroid of each vector, no two alike under one prefix while there are enough centroids.

    Args:
        vectors: ``(n, F)`` fp32.
        centroids: ``(k, F)`` fp32.
        prefixes: ``(n, l)`` int64, the codes before this one. A prefix of more than ``k`` vectors gives each centroid to the same
            number of them, up to one.

    Returns:
        ``(n,)`` int64 in ``[0, k)``.
    """
    codes = np.empty(len(vectors), dtype=np.int64)
    # a table of one level has empty prefixes, all alike, and nothing to sort by
    order = np.lexsort(prefixes.T[::-1]) if prefixes.shape[1] else np.arange(len(vectors))
    changes = (prefixes[order][1:] != prefixes[order][:-1]).any(axis=1)
    for group in np.split(order, np.flatnonzero(changes) + 1):
        for begin in range(0, len(group), len(centroids)):
            part = group[begin : begin + len(centroids)]
            codes[part] = linear_sum_assignment(squared_distances(vectors[part], centroids))[1]
    return codes
