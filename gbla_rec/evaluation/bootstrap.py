"""Percentile bootstrap over users: how far a mean, or the difference of two methods, could have come out otherwise."""

# U users (docs/shapes.md); X columns, one a metric of a method

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

CONFIDENCE = 0.95
MAX_DRAWS_AT_ONCE = 4_000_000


def resampled_means(values: NDArray[np.float64], num_samples: int, seed: int) -> NDArray[np.float64]:
    """The means of every column over resampled sets of users; one set serves all columns, so that differences of columns are paired.

    Args:
        values: ``(U, X)``, U at least 1; one row a user.
        num_samples: number of resampled user sets, at least 1.
        seed: the same seed gives the same sets.

    Returns:
        ``(num_samples, X)``.

    Raises:
        ValueError: if there is no user, a value is not finite, or ``num_samples`` is not positive.
    """
    if values.ndim != 2 or len(values) == 0:
        raise ValueError(f"values must be (U, X) with at least one user, got shape {values.shape}")
    if not np.isfinite(values).all():
        user = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        raise ValueError(f"values must be finite, those of user {user} are not")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    generator = np.random.default_rng(seed)
    num_users = len(values)
    block = max(1, MAX_DRAWS_AT_ONCE // num_users)
    sums = []
    for start in range(0, num_samples, block):
        rows = min(block, num_samples - start)
        drawn = generator.integers(num_users, size=rows * num_users)
        # a sparse product adds in the order of the draws, whatever the number of threads
        draws = sp.csr_matrix((np.ones(len(drawn)), drawn, np.arange(rows + 1) * num_users), shape=(rows, num_users))
        sums.append(draws @ values)
    return np.asarray(np.concatenate(sums) / num_users, dtype=np.float64)


def percentile_interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values ``(num_samples,)``."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bootstrap_interval(per_user: NDArray[np.float64], num_samples: int, seed: int) -> tuple[float, float, float]:
    """The mean over users and its 95 % percentile bootstrap interval (Efron, 1979).

    It shows the sampling of users only: the spread over training seeds comes on top.

    Args:
        per_user: ``(U,)`` one metric value per user, U at least 1.
        num_samples: number of resampled user sets, at least 1.
        seed: the same seed gives the same interval.

    Returns:
        ``(mean, low, high)``.

    Raises:
        ValueError: as ``resampled_means``.
    """
    if per_user.ndim != 1:
        raise ValueError(f"per_user must be (U,), got shape {per_user.shape}")
    low, high = percentile_interval(resampled_means(per_user[:, None], num_samples, seed)[:, 0])
    return float(per_user.mean()), low, high


def paired_bootstrap_interval(
    first: NDArray[np.float64], second: NDArray[np.float64], num_samples: int, seed: int
) -> tuple[float, float, float]:
    """The mean of ``first - second`` over the same users and its 95 % percentile bootstrap interval.

    Pairing removes what both methods share (some users are easy for both), so the interval is narrower than those of
    the two means; it excludes 0 where the methods differ.

    Args:
        first: ``(U,)`` one metric value per user.
        second: ``(U,)`` the same metric of the same users in the same order.
        num_samples: number of resampled user sets, at least 1.
        seed: the same seed gives the same interval.

    Returns:
        ``(mean difference, low, high)``.

    Raises:
        ValueError: if the shapes differ, or as ``bootstrap_interval``.
    """
    if first.shape != second.shape:
        raise ValueError(f"first and second must hold the same users, got shapes {first.shape} and {second.shape}")
    return bootstrap_interval(first - second, num_samples, seed)
