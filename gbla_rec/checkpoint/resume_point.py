"""Which checkpoint a resumed run goes on from, and what happens to those that are newer."""

from pathlib import Path

from gbla_rec.checkpoint.run_directory import CHECKPOINTS, PROGRESS, STEP_PREFIX, Checkpoint, checkpoint_path, read_progress

SET_ASIDE_PREFIX = "set-aside-"
"""Checkpoints under such a name are never read, pruned or counted; a person may remove them."""


def resume_point(run_dir: Path, step: int | None = None) -> Checkpoint | None:
    """The checkpoint to go on from: that of ``step``, else the newest; None if the run has none.

    Args:
        run_dir: the run.
        step: steps done, as in the name of the checkpoint's directory.

    Raises:
        ValueError: if the newest checkpoint has no readable progress file, or there is none of ``step``; older ones are not
            taken in silence.
    """
    steps = _steps(run_dir)
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
    """Rename the checkpoints of later steps, so that neither pruning nor evaluation takes them for this run's; returns new paths."""
    moved = []
    for later in (later for later in _steps(run_dir) if later > step):
        path = checkpoint_path(run_dir, later)
        number, target = 0, path.with_name(SET_ASIDE_PREFIX + path.name)
        while target.exists():
            number += 1
            target = path.with_name(f"{SET_ASIDE_PREFIX}{path.name}-{number}")
        path.rename(target)
        moved.append(target)
    return moved


def _steps(run_dir: Path) -> list[int]:
    names = [path.name.removeprefix(STEP_PREFIX) for path in (run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())
