"""Percentile bootstrap over users: how far a mean, or the difference of two methods, could have come out otherwise."""

# U users (docs/shapes.md)

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95
MAX_DRAWS_AT_ONCE = 4_000_000


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
        ValueError: if there is no user, a value is not finite, or ``num_samples`` is not positive.
    """
    if per_user.ndim != 1 or len(per_user) == 0:
        raise ValueError(f"per_user must be (U,) with at least one user, got shape {per_user.shape}")
    if not np.isfinite(per_user).all():
        raise ValueError(f"per_user must be finite, the value of user {int(np.flatnonzero(~np.isfinite(per_user))[0])} is not")
    if num_samples < 1:
        raise ValueError(f"num_samples must be positive, got {num_samples}")
    generator = np.random.default_rng(seed)
    block = max(1, MAX_DRAWS_AT_ONCE // len(per_user))
    means = np.concatenate(
        [
            per_user[generator.integers(len(per_user), size=(min(block, num_samples - start), len(per_user)))].mean(axis=1)
            for start in range(0, num_samples, block)
        ]
    )
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(per_user.mean()), float(low), float(high)


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
