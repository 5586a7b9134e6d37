"""Which checkpoint a resumed run goes on from, and what happens to those that are newer."""

import json
from pathlib import Path

from gbla_rec.checkpoint.run_directory import (
    PER_USER,
    PROGRESS,
    RESULTS,
    RESULTS_TABLE,
    STEP_PREFIX,
    Checkpoint,
    checkpoint_path,
    read_progress,
)
from gbla_rec.workspace import checkpoint_steps

SET_ASIDE_PREFIX = "set-aside-"
"""Checkpoints and results under such a name are never read, pruned or counted; a person may remove them."""


def resume_point(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint to go on from: that of ``step``, else the newest; None if the run has none.

    Args:
        run_dir: the run.
        step: steps done, as in the name of the checkpoint's directory.

    Raises:
        ValueError: if the newest checkpoint has no readable progress file, or there is none of ``step``; older ones are not
            taken in silence.
    """
    steps = checkpoint_steps(run_dir)
    if step is not None and step not in steps:
        raise ValueError(f"--resume-step must be a step with a checkpoint in {run_dir}, which has {steps}, got {step}")
    if not steps:
        return None
    path = checkpoint_path(run_dir, steps[-1] if step is None else step)
    if not (path / PROGRESS).exists():
        older = f"train with --resume-step {steps[-2]} to go on from the one before" if len(steps) > 1 else "start a new run"
        raise ValueError(f"checkpoint {path} is damaged: it has no {PROGRESS}; copy it again, or {older}")
    return Checkpoint(path, read_progress(path / PROGRESS))


def set_aside_after(run_dir: Path, step: int) -> list[Path]:
    """Rename what is of later steps, so that nothing takes it for this run's: checkpoints, and an evaluation that read one of them.

    Args:
        run_dir: the run.
        step: that training goes on from.

    Returns:
        The new paths.
    """
    # the evaluation first: a kill between the two must not leave it beside checkpoints that it did not read
    stale = _evaluation_files(run_dir) if _evaluated_step(run_dir) > step else []
    return [
        _set_aside(path) for path in (*stale, *(checkpoint_path(run_dir, later) for later in checkpoint_steps(run_dir) if later > step))
    ]


def _set_aside(path: Path) -> Path:
    number, target = 0, path.with_name(SET_ASIDE_PREFIX + path.name)
    while target.exists():
        number += 1
        target = path.with_name(f"{SET_ASIDE_PREFIX}{path.name}-{number}")
    path.rename(target)
    return target


def _evaluation_files(run_dir: Path) -> list[Path]:
    # last the one that says that the run was evaluated, as in writing
    return [path for path in (run_dir / RESULTS_TABLE, run_dir / PER_USER, run_dir / RESULTS) if path.exists()]


def _evaluated_step(run_dir: Path) -> float:
    """The latest step whose checkpoint the evaluation read; infinity if its results do not tell, or were not written before a kill."""
    path = run_dir / RESULTS
    try:
        results = json.loads(path.read_text())
        names = [results["checkpoint"], *results.get("shortlist_validation_recall", ())]
        return max(int(name.removeprefix(STEP_PREFIX)) for name in names)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return float("inf")
