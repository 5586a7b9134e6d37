"""One training of a table: which command comes next, told from what its run directory holds."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.scheduler import Stage
from benchmarks.quality.tables import Configuration
from gbla_apps.run_config_options import parse_run_config
from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import RESULTS, readable_checkpoints
from gbla_rec.config import RunConfig, differing_fields, from_json
from gbla_rec.data.dataset import PreparedDataset

TRAIN, EVALUATE = "train", "evaluate"
LEAST_TRAINING_SECONDS = 60.0
"""Imports, data and compilation take up to so long: what starts later saves nothing."""
LEAST_EVALUATION_SECONDS = 60.0
"""Assumed before the first evaluation of a table has ended."""
LOGS = "quality"
"""Directory of logs and attempts in the workspace."""


@dataclass(frozen=True, kw_only=True)
class RunJob:
    """A training of one configuration with one seed on one dataset, and its evaluation; a ``scheduler.Job``.

    Attributes:
        configuration: its entry in the table.
        config: the resolved config of the run.
        options: of ``gbla_apps.train``.
        dataset_hash: content hash of the prepared dataset.
        evaluation_seconds: time that an evaluation needs.
    """

    configuration: Configuration
    config: RunConfig
    options: tuple[str, ...]
    dataset_hash: str
    evaluation_seconds: Callable[["RunJob"], float] = lambda job: LEAST_EVALUATION_SECONDS

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.config.name

    @property
    def directory(self) -> Path:
        """Logs and attempts."""
        return workspace.root() / LOGS / self.name

    @property
    def results(self) -> Path | None:
        """``results.json`` of this very config and dataset; None before it is evaluated."""
        run_dir = self.run_dir()
        path = None if run_dir is None else run_dir / RESULTS
        return path if path is not None and path.exists() else None

    def run_dir(self) -> Path | None:
        """The newest run of this name, if it has this config and dataset."""
        try:
            run_dir = workspace.latest_run_dir(self.name)
        except FileNotFoundError:
            return None
        return run_dir if self.obstacle(run_dir) is None else None

    def obstacle(self, run_dir: Path) -> str | None:
        """Why a run directory is not this job's: what differs; None if it is."""
        try:
            differing = differing_fields(from_json(RunConfig, (run_dir / "config.json").read_text()), self.config)
        except (ValueError, TypeError) as error:
            return f"its config cannot be read ({error})"
        if differing:
            return f"another {', '.join(differing)}"
        found = json.loads((run_dir / "version.json").read_text()).get("dataset_hash")
        return None if found == self.dataset_hash else "another version of the dataset"

    def next_stage(self) -> Stage | None:
        """Train anew, train on, evaluate, or nothing."""
        run_dir = self.run_dir()
        if run_dir is None:
            return self._train(is_new=True)
        if (run_dir / RESULTS).exists():
            return None
        steps = [checkpoint.progress.step for checkpoint in readable_checkpoints(run_dir)]
        if not steps or steps[-1] < self.config.training.num_steps:
            return self._train(is_new=False)
        command = (sys.executable, "-m", "gbla_apps.evaluate", "--run-dir", str(run_dir))
        return Stage(name=EVALUATE, command=command, needed_seconds=self.evaluation_seconds(self), urgency=2)

    def _train(self, *, is_new: bool) -> Stage:
        resume = () if is_new else ("--resume",)
        command = (sys.executable, "-m", "gbla_apps.train", *self.options, *resume)
        return Stage(name=TRAIN, command=command, needed_seconds=LEAST_TRAINING_SECONDS, saves_on_sigterm=True, urgency=0 if is_new else 1)


def run_name(dataset: str, configuration: str, seed: int) -> str:
    """Without the table: tables share the runs of a configuration."""
    return f"{dataset}.{configuration}.seed{seed}"


def run_options(dataset: str, recipe: str, configuration: Configuration, seed: int, extra: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The options of ``gbla_apps.train``; later ones win."""
    named = ("--recipe", recipe, "--name", run_name(dataset, configuration.name, seed), "--dataset", dataset, "--seed", str(seed))
    return (*named, *configuration.options, *extra)


def open_dataset_hash(dataset: str) -> str:
    """Content hash of a prepared and tokenized dataset of the workspace.

    Raises:
        FileNotFoundError: if it is neither; the message names the command.
    """
    content_hash = PreparedDataset.open(workspace.dataset_dir(dataset)).manifest.content_hash
    ids_dir = workspace.semantic_ids_dir(dataset)
    if not ids_dir.is_dir():
        raise FileNotFoundError(
            f"dataset {dataset!r} has no semantic IDs in {ids_dir}; make them with: gbla-rec tokenize --recipe RECIPE --dataset {dataset}"
        )
    return content_hash


def make_job(
    dataset: str,
    recipe: str,
    configuration: Configuration,
    seed: int,
    *,
    extra: tuple[str, ...],
    dataset_hash: str,
    evaluation_seconds: Callable[[RunJob], float],
) -> RunJob:
    """Resolve the config of one run.

    Raises:
        ValueError: if the options do not fit the recipe; what is wrong with them was printed.
    """
    options = run_options(dataset, recipe, configuration, seed, extra)
    try:
        config = parse_run_config("train", "", options)
    except SystemExit as error:
        raise ValueError(
            f"configuration {configuration.name!r} must fit recipe {recipe!r}, its options are: {' '.join(options)}"
        ) from error
    return RunJob(
        configuration=configuration, config=config, options=options, dataset_hash=dataset_hash, evaluation_seconds=evaluation_seconds
    )
