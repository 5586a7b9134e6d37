"""Evaluated runs that differ in nothing but the seed, found by directory or by name."""

import itertools
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import RESULTS, read_semantic_ids_hash
from gbla_rec.config import RunConfig, with_defaults
from gbla_rec.evaluation.differing_settings import but_semantic_ids, differing_settings, setting_values, settings_text
from gbla_rec.evaluation.per_user import read_per_user

SEED_ENDING = re.compile(r"([._-]+s|[._-]*seed)?[._-]*\d+$")
"""What tells the names of seeds apart: ``.seed0``, ``_s0``, ``-0``."""


@dataclass(frozen=True, eq=False)
class EvaluatedRun:
    """A run directory and its ``results.json``, whose config has this version's defaults where it was written before a setting was."""

    run_dir: Path
    results: Mapping[str, Any]

    @classmethod
    def open(cls, run_dir: Path) -> "EvaluatedRun":
        """Read the results of a run.

        Raises:
            FileNotFoundError: if it was not evaluated.
            ValueError: if they are damaged, or from before they held the config and the values of single users.
        """
        path = run_dir / RESULTS
        if not path.is_file():
            raise FileNotFoundError(f"{run_dir} has no {RESULTS}; evaluate it first: gbla-rec evaluate --run-dir {run_dir}")
        try:
            results = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); evaluate again: gbla-rec evaluate --run-dir {run_dir}") from error
        if "per_user" not in results or not isinstance(results.get("config"), Mapping):
            raise ValueError(f"{path} was written by an older version; evaluate again: gbla-rec evaluate --run-dir {run_dir}")
        return cls(run_dir, {**results, "config": with_defaults(RunConfig, results["config"])})

    @property
    def seed(self) -> int:
        """The training seed."""
        return int(self.results["config"]["seed"])

    @property
    def name(self) -> str:
        """The run's name."""
        return str(self.results["config"]["name"])

    def settings_unlike(self, other: "EvaluatedRun") -> list[str]:
        """As ``differing_settings``, without how the semantic IDs were made where both runs have the same ones."""
        differing = differing_settings(self.results["config"], other.results["config"])
        own, others = (read_semantic_ids_hash(run.run_dir) for run in (self, other))
        if own is None or own != others:
            return differing
        return but_semantic_ids(differing)

    def per_user(self) -> pl.DataFrame:
        """The values of single users, see ``read_per_user``."""
        return read_per_user(self.run_dir, self.results)


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs of one model with distinct seeds, in the order of the seeds."""

    name: str
    runs: tuple[EvaluatedRun, ...]

    @classmethod
    def of(cls, runs: Sequence[EvaluatedRun], name: str | None = None) -> "RunGroup":
        """Group ``runs``, called ``name``, or by ``common_name``.

        Raises:
            ValueError: if there is no run, a seed comes twice, or two runs differ in more than the seed; names the fields and
                both values.
        """
        if not runs:
            raise ValueError("a group must have at least one run, got none")
        ordered = sorted(runs, key=lambda run: (run.seed, run.name, str(run.run_dir)))
        first = ordered[0]
        for earlier, run in itertools.pairwise(ordered):
            if run.seed == earlier.seed:
                raise ValueError(f"runs of a group must have distinct seeds, {earlier.run_dir} and {run.run_dir} both have {run.seed}")
            if differing := first.settings_unlike(run):
                values = setting_values(differing, first.results["config"], run.results["config"])
                raise ValueError(
                    f"runs of a group must differ in the seed only, {first.run_dir} and {run.run_dir} differ in {settings_text(values)}; "
                    "make two groups of them (gbla-rec compare --a RUN ... --b RUN ...), or name the run directories of one group"
                )
        return cls(name or common_name([run.name for run in ordered]), tuple(ordered))

    @classmethod
    def find(cls, specifications: Sequence[str | Path], name: str | None = None) -> "RunGroup":
        """Group the runs that ``specifications`` name, each a run directory or a name; see ``find_runs``.

        Raises:
            FileNotFoundError: if a specification finds no evaluated run.
            ValueError: if results are damaged, or as ``of``.
        """
        found = {run_dir.resolve(): run_dir for specification in specifications for run_dir in find_runs(specification)}
        return cls.of([EvaluatedRun.open(run_dir) for run_dir in found.values()], name)

    def differing_values(self, other: "RunGroup") -> dict[str, dict[str, Any]]:
        """Both values (``first``, ``second``) of each setting in which the groups differ."""
        first, second = self.runs[0], other.runs[0]
        return setting_values(first.settings_unlike(second), first.results["config"], second.results["config"])

    @property
    def run_dirs(self) -> tuple[Path, ...]:
        """Absolute paths of the runs."""
        return tuple(run.run_dir.resolve() for run in self.runs)

    @property
    def config(self) -> Mapping[str, Any]:
        """The config of the first run."""
        return self.runs[0].results["config"]  # type: ignore[no-any-return]


def told_apart(groups: Sequence[RunGroup]) -> list[RunGroup]:
    """The same groups; a name that stands for unlike runs gets their directories added."""
    alike: dict[str, set[tuple[Path, ...]]] = {}
    for group in groups:
        alike.setdefault(group.name, set()).add(group.run_dirs)
    return [
        group if len(alike[group.name]) == 1 else RunGroup(f"{group.name} {_directories(group, alike[group.name])}", group.runs)
        for group in groups
    ]


def _directories(group: RunGroup, alike: Collection[tuple[Path, ...]]) -> str:
    """Where the group's runs lie: as many last parts of their paths as differ from those of the others in ``alike``."""

    def ends(run_dirs: tuple[Path, ...], num_parts: int) -> tuple[str, ...]:
        return tuple("/".join(path.parts[-num_parts:]) for path in run_dirs)

    num_parts = next(number for number in itertools.count(1) if len({ends(run_dirs, number) for run_dirs in alike}) == len(alike))
    return " + ".join(ends(group.run_dirs, num_parts))


def common_name(names: Sequence[str]) -> str:
    """The one name of a group's runs, without the seed's own part (``sggs`` for ``sggs.seed0`` and ``sggs.seed1``), or all names."""
    if len(set(names)) == 1:
        return names[0]
    stems = {SEED_ENDING.sub("", name) for name in names}
    is_told_by_seeds = len(stems) == 1 and stems.isdisjoint({"", *names})
    return stems.pop() if is_told_by_seeds else all_names(names)


def all_names(names: Iterable[str]) -> str:
    """Each name once: ``shop + shop_sss``."""
    return " + ".join(sorted(set(names)))


def find_runs(specification: str | Path) -> list[Path]:
    """The run directory itself, or of all evaluated runs of a name the newest one of each seed.

    Args:
        specification: a directory, or the name of runs in the workspace; ``*`` stands for any part of a name.

    Raises:
        FileNotFoundError: if there is none.
    """
    path = Path(specification)
    if (path / "config.json").is_file():
        return [path]
    if path.is_absolute() or len(path.parts) != 1:
        raise FileNotFoundError(f"{path} is not a run directory: it has no config.json")
    newest: dict[tuple[str, int], Path] = {}
    # directories of one name are called by the time of their start
    for found in sorted(workspace.runs_dir(path.name).parent.glob(f"{path.name}/*/{RESULTS}")):
        run = EvaluatedRun.open(found.parent)
        newest[run.name, run.seed] = found.parent
    if not newest:
        raise FileNotFoundError(f"no evaluated run called {path.name!r} in {workspace.root() / 'runs'}; {_how_to_have_one(path.name)}")
    return list(newest.values())


def _how_to_have_one(name: str) -> str:
    if workspace.run_dirs(name):
        return f"evaluate one: gbla-rec evaluate --name {name}"
    evaluated = sorted({path.parent.parent.name for path in workspace.runs_dir("*").parent.glob(f"*/*/{RESULTS}")})
    return f"none was trained under this name; evaluated runs are called: {', '.join(evaluated) or 'none yet'}"
