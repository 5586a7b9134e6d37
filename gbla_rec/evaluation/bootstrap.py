"""Percentile bootstrap over users and training seeds: how far a mean, or a difference, could have come out otherwise."""

# U users (docs/shapes.md); X columns, one a metric of a method

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

CONFIDENCE = 0.95
BOOTSTRAP_SEED = 0
"""Of every resampling: one seed gives one set of users, so that the tables of one evaluation agree."""
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


def resampled_seed_weights(num_seeds: int, num_samples: int, generator: np.random.Generator) -> NDArray[np.float64]:
    """Weights of training seeds whose weighted mean varies as the mean over new seeds would.

    Drawing ``S`` seeds with replacement and taking their plain mean has ``(S - 1) / S`` of the variance that it should have, which is
    much at three seeds; the deviations from ``1 / S`` are stretched by ``sqrt(S / (S - 1))`` to mend that (Rao and Wu, JASA 83, 1988).

    Args:
        num_seeds: ``S``, at least 2.
        num_samples: rows of the result.
        generator: where the draws come from.

    Returns:
        ``(num_samples, S)``; each row sums to 1.

    Raises:
        ValueError: if there are fewer than two seeds, whose spread nobody knows.
    """
    if num_seeds < 2:
        raise ValueError(f"num_seeds must be at least 2 to know a spread, got {num_seeds}")
    drawn = generator.multinomial(num_seeds, np.full(num_seeds, 1 / num_seeds), size=num_samples) / num_seeds
    return np.asarray(1 / num_seeds + (drawn - 1 / num_seeds) * np.sqrt(num_seeds / (num_seeds - 1)), dtype=np.float64)


def percentile_interval(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % percentile interval of resampled values ``(num_samples,)`` (Efron, 1979)."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)
