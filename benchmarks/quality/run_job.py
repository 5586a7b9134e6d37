"""One training of a table: which command comes next, told from what its run directory holds."""

import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality.attempts import longest_seconds
from benchmarks.quality.scheduler import Stage
from benchmarks.quality.tables import CONFIGURATIONS, Configuration, Table
from gbla_apps.run_config_options import parse_run_config
from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import RESULTS, read_dataset_hash, read_semantic_ids_hash, readable_checkpoints
from gbla_rec.config import RunConfig, differing_fields, from_json
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.evaluation.differing_settings import but_semantic_ids
from gbla_rec.evaluation.overrides import overrides_of
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity
from gbla_rec.semantic_ids.table import read_manifest

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
        semantic_ids: the semantic IDs as the model reads them.
        evaluation_seconds: time that an evaluation needs.
        beam_sweep: numbers of beams that the evaluation must have beside the configured one.
    """

    configuration: Configuration
    config: RunConfig
    options: tuple[str, ...]
    dataset_hash: str
    semantic_ids: SemanticIdsIdentity
    evaluation_seconds: Callable[[], float] = lambda: LEAST_EVALUATION_SECONDS
    beam_sweep: tuple[int, ...] = ()

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
        """``results.json`` of this very config and dataset, with the sweep; None before it is evaluated with its own settings."""
        run_dir = self.run_dir()
        path = None if run_dir is None else run_dir / RESULTS
        if path is None or not path.exists():
            return None
        results = json.loads(path.read_text())
        swept = {row["num_beams"] for row in results.get("beam_sweep", ())}
        return path if swept.issuperset(self.beam_sweep) and not overrides_of(results) else None

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
        trained_on = read_semantic_ids_hash(run_dir)
        if trained_on is not None:
            # how the semantic IDs were made does not matter: they are compared themselves
            differing = but_semantic_ids(differing)
        if differing:
            return f"another {', '.join(differing)}"
        if read_dataset_hash(run_dir) != self.dataset_hash:
            return "another version of the dataset"
        return None if self.semantic_ids.covers(trained_on) else "other semantic IDs"

    def next_stage(self) -> Stage | None:
        """Train anew, train on, evaluate, or nothing."""
        run_dir = self.run_dir()
        if run_dir is None:
            return self._train(is_new=True)
        if self.results is not None:
            return None
        steps = [checkpoint.progress.step for checkpoint in readable_checkpoints(run_dir)]
        if not steps or steps[-1] < self.config.training.num_steps:
            # without a checkpoint there is nothing to resume here, and --resume would look for an older run
            return self._train(is_new=not workspace.checkpoint_steps(run_dir))
        sweep = ("--num-beams", *map(str, self.beam_sweep)) if self.beam_sweep else ()
        command = (sys.executable, "-m", "gbla_apps.evaluate", "--run-dir", str(run_dir), *sweep)
        return Stage(name=EVALUATE, command=command, needed_seconds=self.evaluation_seconds(), urgency=2)

    def _train(self, *, is_new: bool) -> Stage:
        resume = () if is_new else ("--resume",)
        command = (sys.executable, "-m", "gbla_apps.train", *self.options, *resume)
        return Stage(name=TRAIN, command=command, needed_seconds=LEAST_TRAINING_SECONDS, saves_on_sigterm=True, urgency=0 if is_new else 1)


def run_name(dataset: str, configuration: str, seed: int) -> str:
    """Without the table: tables share the runs of a configuration."""
    return f"{dataset}.{configuration}.seed{seed}"


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


def table_jobs(
    table: Table,
    dataset: str,
    *,
    recipe: str | None = None,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    extra: tuple[str, ...] = (),
) -> list[RunJob]:
    """The jobs of a table, all rows with the first seed before any with the second.

    Args:
        table: the rows.
        dataset: a prepared and tokenized dataset of the workspace.
        recipe: None: the table's own, else the one that is named as the dataset.
        only: names of rows; None for all.
        seeds: None: those of the table.
        extra: further options of every training.

    Raises:
        ValueError: if ``only`` names a configuration that the table lacks, or options do not fit the recipe.
        FileNotFoundError: if the dataset is not in the workspace.
    """
    unknown = sorted(set(only or ()) - set(table.configurations))
    if unknown:
        raise ValueError(f"--only must name configurations of the table, {', '.join(table.configurations)}; got {', '.join(unknown)}")
    dataset_hash = open_dataset_hash(dataset)
    ids_dir = workspace.semantic_ids_dir(dataset)
    ids_manifest = read_manifest(ids_dir)
    chosen = recipe or table.recipe or dataset
    jobs: list[RunJob] = []

    def evaluation_seconds() -> float:
        # an evaluation cannot be resumed: it needs the time of the longest one, and some more
        seen = longest_seconds((other.directory for other in jobs), EVALUATE)
        return LEAST_EVALUATION_SECONDS if seen is None else 1.5 * seen

    for seed, name in itertools.product(seeds or table.seeds, table.configurations):
        if not only or name in only:
            configuration = CONFIGURATIONS[name]
            named = ("--recipe", chosen, "--name", run_name(dataset, name, seed), "--dataset", dataset, "--seed", str(seed))
            options = (*named, *table.dataset_options(dataset), *configuration.options, *extra)
            config = _resolved(configuration, options)
            jobs.append(
                RunJob(
                    configuration=configuration,
                    config=config,
                    options=options,
                    dataset_hash=dataset_hash,
                    semantic_ids=SemanticIdsIdentity.of(ids_dir, ids_manifest, with_features=config.model.embedding.item_features),
                    evaluation_seconds=evaluation_seconds,
                    beam_sweep=table.beam_sweep,
                )
            )
    return jobs


def _resolved(configuration: Configuration, options: tuple[str, ...]) -> RunConfig:
    try:
        return parse_run_config("train", "", options)
    except SystemExit as error:
        raise ValueError(f"configuration {configuration.name!r} must fit its recipe; its options are: {' '.join(options)}") from error
