"""Paired comparison of groups of runs, each with one or more training seeds, from the values of single users."""

# U users, S seeds of a group (docs/shapes.md has another S)

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.evaluation.bootstrap import BOOTSTRAP_SEED, percentile_interval, resampled_means, resampled_seed_weights
from gbla_rec.evaluation.overrides import overrides_of
from gbla_rec.evaluation.per_user import History, values_by_seed, values_of
from gbla_rec.evaluation.run_group import EvaluatedRun, RunGroup
from gbla_rec.evaluation.searched_beams import searched_beams

METHOD = (
    "Differences of seed-averaged metrics, paired by user. The users' interval is a 95 % percentile bootstrap over users (Efron, 1979), "
    "with the same resampled users for every run. The interval of users and seeds resamples the seeds of each group too, independently "
    "of the users (the pigeonhole bootstrap: Owen, Annals of Applied Statistics 1, 2007), with deviations of seeds stretched by "
    "sqrt(S / (S - 1)) (Rao and Wu, JASA 83, 1988). It needs two seeds in both groups; with three seeds it is too narrow where seeds "
    "differ much more than the means of users do."
)


@dataclass(frozen=True, eq=False)
class MethodValues:
    """One method of a group: for each metric the values of all users under each seed, ``(U, S)``."""

    method: str
    run_dirs: tuple[str, ...]
    metrics: Mapping[str, NDArray[np.float64]]


def compare(
    first: RunGroup,
    second: RunGroup,
    *,
    first_method: str | None = None,
    second_method: str | None = None,
    history: History | None = None,
    num_samples: int = 2_000,
) -> dict[str, Any]:
    """The differences ``first - second`` of every metric, for all users and for the slices of the first run.

    Args:
        first: a group of seeds.
        second: another one, or the same with another method.
        first_method: a score of the model (``generative``, ``item``, ``joint``) or a baseline's name; None for the main score.
        second_method: likewise.
        history: which treatment of the own history; None for the main one of the first run.
        num_samples: resampled sets of users and of seeds.

    Returns:
        ``first`` and ``second`` (name, method, runs), ``same_runs``, ``differ_in`` (both values of each setting in which the groups
        differ), ``protocol``, ``metrics`` and ``slices``. Each metric has the two means,
        ``difference``, ``low`` and ``high`` over users, ``seeds_low`` and ``seeds_high`` over users and seeds (None with one seed in a
        group), and for each side the means and the standard deviation of the seeds.

    Raises:
        ValueError: if the runs were evaluated on different datasets, splits or users, or a run lacks the method, the
            treatment of the history or all common metrics; the message names the run.
    """
    runs = [*first.runs, *second.runs]
    require_same_data(runs)
    frames = {str(run.run_dir): run.per_user() for run in runs}
    require_same_users(frames)
    history = history or runs[0].results["protocol"]["history"]
    left, right = _values(first, first_method, history, frames), _values(second, second_method, history, frames)
    metrics = [metric for metric in left.metrics if metric in right.metrics]
    if not metrics:
        raise ValueError(
            f"both groups must share a metric, {first.name} has {list(left.metrics)} and {second.name} has {list(right.metrics)}"
        )
    users = frames[str(runs[0].run_dir)]
    everyone = np.ones(len(users), dtype=bool)
    return {
        "first": _description(first, left),
        "second": _description(second, right),
        "same_runs": left.run_dirs == right.run_dirs,
        "differ_in": first.differing_values(second),
        "protocol": {
            **runs[0].results["protocol"],
            "history": history,
            "dataset": runs[0].results["dataset"],
            "bootstrap_samples": num_samples,
        },
        "metrics": _differences(left, right, metrics, everyone, num_samples),
        "slices": {
            name: [
                {"label": label, "users": int(members.sum()), "metrics": _differences(left, right, metrics, members, num_samples)}
                for label, members in _slices(users, name, column)
            ]
            for name, column in (("history_length", "history_slice"), ("rarest_target_events", "cold_slice"))
        },
        "method": METHOD,
    }


def require_same_data(runs: Sequence[EvaluatedRun]) -> None:
    """``ValueError`` that names the runs, unless all were evaluated on one dataset and split."""
    reference = runs[0]
    for run in runs[1:]:
        for name in ("dataset", "split"):
            wanted, found = dataset_and_split(reference)[name], dataset_and_split(run)[name]
            if found != wanted:
                raise ValueError(
                    f"runs must be evaluated on the same {name}: {reference.run_dir} has {wanted}, {run.run_dir} has {found}; "
                    "evaluate them on one prepared dataset"
                )


def dataset_and_split(run: EvaluatedRun) -> dict[str, str]:
    """What runs must share to be compared."""
    dataset = run.results["dataset"]
    # the content decides, not the name
    return {"dataset": f"content {dataset['content_hash']}", "split": run.results["protocol"]["split"]}


def require_same_users(frames: Mapping[str, pl.DataFrame]) -> None:
    """``ValueError`` that names the runs, unless the values (by run directory) are of the same users."""
    (reference, users), *others = frames.items()
    for run_dir, frame in others:
        if not frame["user_row"].equals(users["user_row"]):
            raise ValueError(
                f"runs must be evaluated on the same users: {reference} has {len(users)}, {run_dir} has {len(frame)} or others"
            )


def _values(group: RunGroup, method: str | None, history: History, frames: Mapping[str, pl.DataFrame]) -> MethodValues:
    by_run = []
    for run in group.runs:
        scores: Mapping[str, str] = run.results["scores"]
        name = next(iter(scores.values())) if method is None else scores.get(method, method)
        found = values_of(frames[str(run.run_dir)], history, name)
        if not found:
            if history != run.results["protocol"]["history"] and run.results["other_history"] is None:
                raise ValueError(
                    f"{run.run_dir} was not evaluated with the own history {history}; evaluate it again: "
                    f"gbla-rec evaluate --run-dir {run.run_dir} --both-histories"
                )
            there = ", ".join([*scores, *run.results["methods"]])
            raise ValueError(f"{run.run_dir} has no score {name!r} (--score, --a-score, --b-score); it has {there}")
        by_run.append(found)
    label = next(iter(group.runs[0].results["scores"])) if method is None else method
    return MethodValues(label, tuple(str(run.run_dir.resolve()) for run in group.runs), values_by_seed(by_run))


def _description(group: RunGroup, values: MethodValues) -> dict[str, Any]:
    runs = [
        {
            "run": str(run.run_dir),
            "seed": run.seed,
            "checkpoint": run.results["checkpoint"],
            "num_beams": searched_beams(run.results, values.method),
            "overrides": overrides_of(run.results),
            "commit": run.results["versions"]["commit"],
        }
        for run in group.runs
    ]
    return {"name": group.name, "method": values.method, "runs": runs}


def _slices(users: pl.DataFrame, value: str, label: str) -> list[tuple[str, NDArray[np.bool_]]]:
    """Labels and members of the slices that have users, in the order of their values."""
    labels = users.group_by(label).agg(pl.col(value).min()).sort(value)[label]
    return [(name, (users[label] == name).to_numpy()) for name in labels]


def _differences(
    left: MethodValues, right: MethodValues, metrics: Sequence[str], members: NDArray[np.bool_], num_samples: int
) -> dict[str, dict[str, Any]]:
    num_left, num_right = len(left.run_dirs), len(right.run_dirs)
    values = np.concatenate([side.metrics[metric][members] for metric in metrics for side in (left, right)], axis=1)
    draws = resampled_means(values, num_samples, BOOTSTRAP_SEED).reshape(num_samples, len(metrics), num_left + num_right)
    weights = _seed_weights(left, right, num_samples)
    found = {}
    for place, metric in enumerate(metrics):
        of_left, of_right = draws[:, place, :num_left], draws[:, place, num_left:]
        means = [side.metrics[metric][members].mean(axis=0) for side in (left, right)]
        low, high = percentile_interval(of_left.mean(axis=1) - of_right.mean(axis=1))
        seeds: tuple[float, float] | tuple[None, None] = (None, None)
        if weights is not None:
            seeds = percentile_interval((weights[0] * of_left).sum(axis=1) - (weights[1] * of_right).sum(axis=1))
        found[metric] = {
            "first": float(means[0].mean()),
            "second": float(means[1].mean()),
            "difference": float(means[0].mean() - means[1].mean()),
            "low": low,
            "high": high,
            "seeds_low": seeds[0],
            "seeds_high": seeds[1],
            "first_seeds": means[0].tolist(),
            "second_seeds": means[1].tolist(),
            "first_seed_sd": float(means[0].std(ddof=1)) if num_left > 1 else None,
            "second_seed_sd": float(means[1].std(ddof=1)) if num_right > 1 else None,
        }
    return found


def _seed_weights(left: MethodValues, right: MethodValues, num_samples: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
    """Weights ``(num_samples, S)`` of both groups' seeds; None if a group has one seed, whose spread nobody knows."""
    if min(len(left.run_dirs), len(right.run_dirs)) < 2:
        return None
    generator = np.random.default_rng([BOOTSTRAP_SEED, 1])
    first = resampled_seed_weights(len(left.run_dirs), num_samples, generator)
    # two methods of the same runs share their seeds
    return first, first if left.run_dirs == right.run_dirs else resampled_seed_weights(len(right.run_dirs), num_samples, generator)
