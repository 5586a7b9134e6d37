"""Residual k-means: each level's codebook describes what the levels before it left over.

Shapes: ``n`` items, ``F`` features, ``W`` codebook width. After Lee et al. (2022), with k-means in place of a learned
quantiser. Clusters are found by faiss; codes are assigned in fp64, so that they do not depend on who shares the call, unless
that is asked for: ``encode_together`` spreads the items of a catalogue evenly.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from gbla_rec.semantic_ids.balance import assign_with_capacity, balanced_centroids, capacity_of, distinct_last_codes

ASSIGN_BLOCK = 65_536
DISTINCT_SAMPLE = 4


@dataclass(frozen=True, eq=False)
class ResidualQuantizer:
    """Frozen codebooks.

    Attributes:
        centroids: per level ``(k, F)`` fp32; ``k <= W``, fewer where the data has fewer distinct vectors than codes.
    """

    centroids: tuple[NDArray[np.float32], ...]

    @classmethod
    def fit(
        cls, embeddings: NDArray[np.float32], *, num_levels: int, width: int, iterations: int, seed: int, balance: float | None = None
    ) -> "ResidualQuantizer":
        """Find ``num_levels`` codebooks, one after the other.

        Args:
            embeddings: ``(n, F)`` fp32, finite; ``n`` may be below ``width`` and rows may repeat or be zero.
            num_levels: codebooks.
            width: ``W``.
            iterations: of Lloyd's algorithm per codebook.
            seed: the same seed gives the same codebooks on the same machine.
            balance: if given, at least 1: no centroid stands for more than that many times the even share of the rows.
        """
        centroids: list[NDArray[np.float32]] = []
        residual = embeddings
        for level in range(num_levels):
            if level:
                residual = residual - centroids[-1][_assign(residual, centroids[-1], balance)]
            centroids.append(_fit_codebook(residual, width, iterations, seed + level, balance))
        return cls(tuple(centroids))

    def encode(self, embeddings: NDArray[np.float32]) -> NDArray[np.int64]:
        """Codes ``(n, num_levels)`` int64 of ``embeddings`` ``(n, F)``; a row's codes do not depend on the other rows.

        Raises:
            ValueError: if the vectors are not as wide as the codebooks.
        """
        return self.encode_together(embeddings, balance=None, distinct_last_code=False)

    def encode_together(self, embeddings: NDArray[np.float32], *, balance: float | None, distinct_last_code: bool) -> NDArray[np.int64]:
        """Codes of a whole catalogue, as ``encode`` but spread over the codes; a row's codes depend on the other rows.

        Args:
            embeddings: ``(n, F)`` fp32.
            balance: if given, at least 1: a code of a level goes to at most ``ceil(balance * n / centroids)`` rows.
            distinct_last_code: rows with equal codes before the last level get different last codes, the cheapest such
                choice, while the codebook has enough; this level then has no capacity.

        Returns:
            ``(n, num_levels)`` int64.

        Raises:
            ValueError: if the vectors are not as wide as the codebooks.
        """
        features = self.centroids[0].shape[1]
        if embeddings.ndim != 2 or embeddings.shape[1] != features:
            raise ValueError(f"embeddings must have shape (n, {features}) like the codebooks, got {embeddings.shape}")
        codes = np.empty((len(embeddings), len(self.centroids)), dtype=np.int64)
        residual = embeddings
        for level, centroids in enumerate(self.centroids):
            if distinct_last_code and level == len(self.centroids) - 1:
                codes[:, level] = distinct_last_codes(residual, centroids, codes[:, :level])
            else:
                codes[:, level] = _assign(residual, centroids, balance)
            residual = residual - centroids[codes[:, level]]
        return codes

    def residual_energy(self, embeddings: NDArray[np.float32], codes: NDArray[np.int64]) -> list[float]:
        """After each level: the squared length of what is left over, as a fraction of that of ``embeddings``."""
        total = max(float(np.square(embeddings, dtype=np.float64).sum()), np.finfo(np.float64).tiny)
        residual, fractions = embeddings, []
        for level, centroids in enumerate(self.centroids):
            residual = residual - centroids[codes[:, level]]
            fractions.append(float(np.square(residual, dtype=np.float64).sum()) / total)
        return fractions

    def save(self, directory: Path) -> None:
        """Write ``centroids_<level>.npy``."""
        for level, centroids in enumerate(self.centroids):
            np.save(directory / f"centroids_{level}.npy", centroids)

    @classmethod
    def load(cls, directory: Path, num_levels: int) -> "ResidualQuantizer":
        """Read what ``save`` wrote."""
        return cls(tuple(np.load(directory / f"centroids_{level}.npy", allow_pickle=False) for level in range(num_levels)))


def default_codebook_width(num_items: int, min_width: int) -> int:
    """The next power of two >= (4 N)^(1/3), at least ``min_width``: three levels then have room for 4 N prefixes."""
    width = 1
    # integers: the cube root of a cube is not exact in floating point
    while width**3 < 4 * num_items:
        width *= 2
    return max(width, min_width)


def dedup_slots(prefixes: NDArray[np.int64], width: int) -> NDArray[np.int64]:
    """The last code: 0, 1, 2, .. among the items of one prefix, in row order; beyond ``width`` the slots are dealt again.

    Args:
        prefixes: ``(n, num_levels)`` int64.
        width: number of slots; dealing them round keeps the shared IDs of a crowded prefix equally small.
    """
    order = np.lexsort(prefixes.T[::-1])
    ordered = prefixes[order]
    starts = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)))
    ordinal = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    slots = np.empty(len(order), dtype=np.int64)
    slots[order] = ordinal % width
    return slots


def _fit_codebook(vectors: NDArray[np.float32], width: int, iterations: int, seed: int, balance: float | None) -> NDArray[np.float32]:
    # the first rows nearly always have enough distinct ones: sorting all of a million rows takes seconds
    if len(np.unique(vectors[: DISTINCT_SAMPLE * width], axis=0)) <= width:
        distinct = np.unique(vectors, axis=0)
        if len(distinct) <= width:
            # k-means needs as many points as clusters; here every vector can be its own centroid
            return distinct
    with _single_thread():
        kmeans = faiss.Kmeans(vectors.shape[1], width, niter=iterations, seed=seed, min_points_per_centroid=1)
        kmeans.train(np.ascontiguousarray(vectors))
    centroids = np.array(kmeans.centroids, dtype=np.float32)
    if balance is None:
        return centroids
    return balanced_centroids(vectors, centroids, capacity_of(len(vectors), len(centroids), balance))


def _assign(vectors: NDArray[np.float32], centroids: NDArray[np.float32], balance: float | None) -> NDArray[np.int64]:
    if balance is None:
        return _nearest(vectors, centroids)
    return assign_with_capacity(vectors, centroids, capacity_of(len(vectors), len(centroids), balance))


def _nearest(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index of the nearest centroid of each row; the lower index where two are equally near."""
    wide = centroids.astype(np.float64)
    offset = np.square(wide).sum(axis=1)
    blocks = [
        np.argmin(offset - 2.0 * (vectors[begin : begin + ASSIGN_BLOCK].astype(np.float64) @ wide.T), axis=1)
        for begin in range(0, len(vectors), ASSIGN_BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.empty(0, dtype=np.int64)


@contextmanager
def _single_thread() -> Iterator[None]:
    # the order of faiss' partial sums, and with it the last bit, follows its number of threads
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
