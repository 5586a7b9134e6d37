"""Rows of length 1, by which item vectors are compared; numpy alone, for training reads vectors without the fitting of them."""

import numpy as np
from numpy.typing import NDArray


def normalize_rows(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each row of ``vectors`` ``(N, F)`` divided by its Euclidean norm; rows shorter than rounding noise (1e-6) become exactly zero."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = np.zeros_like(vectors)
    np.divide(vectors, norms, out=unit, where=norms > 1e-6)
    return unit
