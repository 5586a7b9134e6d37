"""Per-user values become means with intervals, for all users and for slices of them."""

# U users (docs/shapes.md)

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gbla_rec.evaluation.bootstrap import BOOTSTRAP_SEED, percentile_interval, resampled_means
from gbla_rec.evaluation.slices import UserSlice

UserValues = Mapping[str, Mapping[str, NDArray[np.float64]]]
"""Method -> metric -> ``(U,)`` values; all methods have the same users, the first method is the one compared with."""
Summaries = dict[str, dict[str, dict[str, float]]]


def summarise(per_user: UserValues, num_samples: int) -> Summaries:
    """Method -> metric -> ``mean``, ``low``, ``high``, and the paired difference of the first method to this one.

    Intervals are 95 % percentile bootstraps over users; all methods and metrics share the resampled sets of users.

    Args:
        per_user: at least one user.
        num_samples: resampled sets of users.
    """
    names = [(method, metric) for method, scores in per_user.items() for metric in scores]
    values = np.stack([per_user[method][metric] for method, metric in names], axis=1)
    draws = dict(zip(names, resampled_means(values, num_samples, BOOTSTRAP_SEED).T, strict=True))
    first = next(iter(per_user))
    found: Summaries = {}
    for method, metric in names:
        low, high = percentile_interval(draws[method, metric])
        summary = {"mean": float(per_user[method][metric].mean()), "low": low, "high": high}
        if method != first and metric in per_user[first]:
            low, high = percentile_interval(draws[first, metric] - draws[method, metric])
            difference = float((per_user[first][metric] - per_user[method][metric]).mean())
            summary |= {"first_minus_this": difference, "difference_low": low, "difference_high": high}
        found.setdefault(method, {})[metric] = summary
    return found


def summarise_slices(per_user: UserValues, slices: Sequence[UserSlice], num_samples: int) -> list[dict[str, Any]]:
    """``label``, ``low``, ``high``, ``users`` and ``methods`` (as ``summarise``; empty without users) of each slice."""
    found = []
    for part in slices:
        users = int(np.count_nonzero(part.members))
        inside = {method: {metric: values[part.members] for metric, values in scores.items()} for method, scores in per_user.items()}
        methods = summarise(inside, num_samples) if users else {}
        found.append({"label": part.label, "low": part.low, "high": part.high, "users": users, "methods": methods})
    return found
