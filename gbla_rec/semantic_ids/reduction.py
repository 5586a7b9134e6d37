"""Truncated singular value decomposition, shared by the embedders: fit the directions, project, normalise."""

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.utils.extmath import randomized_svd

from gbla_rec.semantic_ids.unit_rows import normalize_rows

NUM_POWER_ITERATIONS = 7


def fit_directions(matrix: csr_array | NDArray[np.float32], dim: int, seed: int) -> NDArray[np.float32]:
    """The leading right singular vectors of ``matrix`` ``(N, X)``: ``(min(dim, N, X), X)`` fp32, deterministic for a seed."""
    dim = min(dim, *matrix.shape)
    _, _, directions = randomized_svd(matrix, dim, n_iter=NUM_POWER_ITERATIONS, random_state=seed)
    return np.ascontiguousarray(directions, dtype=np.float32)


def project(matrix: csr_array | NDArray[np.float32], directions: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of ``matrix`` ``(n, X)`` along ``directions`` ``(F, X)``, scaled to length 1; zero rows stay zero: ``(n, F)`` fp32."""
    return normalize_rows(np.asarray(matrix @ directions.T, dtype=np.float32))
