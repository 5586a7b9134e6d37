"""What a report is made from: runs sorted into groups of seeds and datasets, their values averaged over seeds."""

# U users (docs/shapes.md)

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.checkpoint.run_directory import METRICS
from gbla_rec.evaluation.compare import dataset_and_split, require_same_users
from gbla_rec.evaluation.overrides import overrides_of
from gbla_rec.evaluation.per_user import History, values_by_seed, values_of
from gbla_rec.evaluation.report_plots import Estimate, TrainingCurve
from gbla_rec.evaluation.run_group import EvaluatedRun, RunGroup, all_names, find_runs
from gbla_rec.evaluation.slices import slices_at
from gbla_rec.evaluation.summaries import UserValues, summarise, summarise_slices

HISTORIES: tuple[History, ...] = ("kept", "removed")
NUM_SAMPLES = 2_000


@dataclass(frozen=True, eq=False)
class SlicedEstimates:
    """Labels and numbers of users of the slices that have users; by method, by metric, one estimate a slice."""

    labels: list[str]
    users: list[int]
    methods: dict[str, dict[str, list[Estimate]]]


@dataclass(frozen=True, eq=False)
class DatasetRuns:
    """Groups that were evaluated on one dataset, split and set of users; ``frames`` has the values of single users by run."""

    groups: tuple[RunGroup, ...]
    frames: Mapping[Path, pl.DataFrame]

    @classmethod
    def of(cls, groups: Sequence[RunGroup]) -> "DatasetRuns":
        """Read the values of single users.

        Raises:
            ValueError: if two runs have different users; names them.
        """
        frames = {run.run_dir: run.per_user() for group in groups for run in group.runs}
        require_same_users({str(run_dir): frame for run_dir, frame in frames.items()})
        return cls(tuple(groups), frames)

    @property
    def first(self) -> EvaluatedRun:
        """The first run, whose slices and baselines stand for all."""
        return self.groups[0].runs[0]

    @property
    def histories(self) -> list[History]:
        """Treatments of the own history that the first run was evaluated with, its main one first."""
        main: History = self.first.results["protocol"]["history"]
        return [main, *(other for other in HISTORIES if other != main and self.first.results["other_history"])]

    def estimates(self, history: History) -> dict[str, dict[str, Estimate]]:
        """Method -> metric -> estimate: every score of every group evaluated so, then the baselines."""
        per_seed = self._per_seed(history)
        summaries = summarise(_over_seeds(per_seed), NUM_SAMPLES)
        return {
            method: {metric: _estimate(summary, per_seed[method][metric].mean(axis=0).tolist()) for metric, summary in metrics.items()}
            for method, metrics in summaries.items()
        }

    def sliced(self, slicing: str, history: History) -> SlicedEstimates:
        """Estimates by ``history_length`` or ``rarest_target_events``, in the slices of the first run."""
        edges = [part["low"] for part in self.first.results["slices"][slicing][1:]]
        slices = slices_at(self.frames[self.first.run_dir][slicing].to_numpy(), edges)
        parts = [part for part in summarise_slices(_over_seeds(self._per_seed(history)), slices, NUM_SAMPLES) if part["users"]]
        return SlicedEstimates(
            labels=[part["label"] for part in parts],
            users=[part["users"] for part in parts],
            methods={
                method: {metric: [_estimate(part["methods"][method][metric], []) for part in parts] for metric in metrics}
                for method, metrics in parts[0]["methods"].items()
            },
        )

    def _per_seed(self, history: History) -> dict[str, dict[str, NDArray[np.float64]]]:
        """Method -> metric -> ``(U, S)``."""
        found = {}
        for group in self.groups:
            for place, score in enumerate(group.runs[0].results["scores"]):
                runs = [values_of(self.frames[run.run_dir], history, run.results["scores"][score]) for run in group.runs]
                # a run that was not evaluated so has no values
                if all(runs):
                    found[f"{group.name} ({score})" if place else group.name] = values_by_seed(runs)
        for method in self.first.results["methods"]:
            if method not in self.first.results["scores"].values():
                found[method] = values_by_seed([values_of(self.frames[self.first.run_dir], history, method)])
        return found


def group_runs(specifications: Sequence[str | Path]) -> list[DatasetRuns]:
    """Find runs (see ``find_runs``) and sort them: those that differ in the seed only are a group, groups of one dataset stand together.

    A group that was not evaluated with its own settings says so in its name; no two groups have one name.
    Runs of several names are one group too, unless a seed comes twice among them: then each name is a group.

    Raises:
        FileNotFoundError: if a specification finds no evaluated run.
        ValueError: if a seed comes twice under one name; names the runs.
    """
    found = {path.resolve(): path for specification in specifications for path in find_runs(specification)}
    alike: list[list[EvaluatedRun]] = []
    for run in (EvaluatedRun.open(path) for path in found.values()):
        known = next((runs for runs in alike if _is_alike(runs[0], run)), None)
        if known is None:
            alike.append([run])
        else:
            known.append(run)
    names: set[str] = set()
    by_data: dict[tuple[str, ...], list[RunGroup]] = {}
    for runs in (part for same in alike for part in _by_name_if_seeds_repeat(same)):
        group = RunGroup.of(runs)
        group = RunGroup(_unused_name(group, names), group.runs)
        names.add(group.name)
        by_data.setdefault(tuple(dataset_and_split(runs[0]).values()), []).append(group)
    return [DatasetRuns.of(groups) for groups in by_data.values()]


def _is_alike(first: EvaluatedRun, second: EvaluatedRun) -> bool:
    return dataset_and_split(first) == dataset_and_split(second) and not first.settings_unlike(second)


def _by_name_if_seeds_repeat(runs: list[EvaluatedRun]) -> list[list[EvaluatedRun]]:
    if len({run.seed for run in runs}) == len(runs):
        return [runs]
    by_name: dict[str, list[EvaluatedRun]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return list(by_name.values())


def training_curve(run: EvaluatedRun) -> TrainingCurve:
    """What ``metrics.jsonl`` of a run says; empty if there is none."""
    path = run.run_dir / METRICS
    loss, validation = [], []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            # the line that a kill cut short
            continue
        if entry["kind"] == "train":
            loss.append((int(entry["step"]), float(entry["loss"])))
        elif entry["kind"] == "validation":
            validation.append((int(entry["step"]), float(entry["nll"])))
    return TrainingCurve(loss, validation)


def _unused_name(group: RunGroup, used: set[str]) -> str:
    """The group's name; where another group has it, all names of its runs; only where that is taken too, with a number."""
    overridden = " with overrides" if any(overrides_of(run.results) for run in group.runs) else ""
    names = [f"{name}{overridden}" for name in (group.name, all_names(run.name for run in group.runs))]
    numbered = (f"{names[-1]} #{number}" for number in itertools.count(2))
    return next(name for name in itertools.chain(names, numbered) if name not in used)


def _over_seeds(per_seed: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> UserValues:
    return {method: {metric: values.mean(axis=1) for metric, values in metrics.items()} for method, metrics in per_seed.items()}


def _estimate(summary: Mapping[str, float], seeds: Sequence[float]) -> Estimate:
    return Estimate(summary["mean"], summary["low"], summary["high"], tuple(seeds) if len(seeds) > 1 else ())
