"""Where things live on disk, so that no path is ever copied by hand from one command to the next.

The workspace is ``$GBLA_REC_WORKSPACE``, else ``./workspace``::

    datasets/<dataset>/                    a prepared dataset (gbla_rec.data)
    semantic_ids/<dataset>/                its semantic-ID table and quality report
    runs/<run name>/<UTC time>/            config.json, metrics.jsonl, checkpoints/, results.json
"""

import os
from datetime import UTC, datetime
from pathlib import Path

VARIABLE = "GBLA_REC_WORKSPACE"
CHECKPOINTS, STEP_PREFIX = "checkpoints", "step_"
"""Where the checkpoints of a run lie, and how the directory of one begins."""


def root() -> Path:
    """The workspace directory (it need not exist)."""
    return Path(os.environ.get(VARIABLE, "workspace"))


def dataset_dir(name: str) -> Path:
    """Directory of the prepared dataset ``name``."""
    return root() / "datasets" / name


def semantic_ids_dir(dataset: str) -> Path:
    """Directory of the semantic IDs of ``dataset``."""
    return root() / "semantic_ids" / dataset


def runs_dir(run_name: str) -> Path:
    """Directory that holds all runs called ``run_name``."""
    return root() / "runs" / run_name


def new_run_dir(run_name: str) -> Path:
    """A path for a run that starts now; later runs sort after earlier ones."""
    return runs_dir(run_name) / datetime.now(UTC).strftime("%Y%m%dT%H%M%S_%fZ")


def checkpoint_steps(run_dir: Path) -> list[int]:
    """The steps of a run's checkpoints, rising; damaged ones count, so that who reads one names it and none is passed over in silence."""
    names = [path.name.removeprefix(STEP_PREFIX) for path in (run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*")]
    return sorted(int(name) for name in names if name.isdecimal())


def run_dirs(run_name: str | None = None) -> list[Path]:
    """The runs called ``run_name``, or all runs, newest first."""
    found = [path.parent for path in (root() / "runs").glob(f"{run_name or '*'}/*/config.json")]
    return sorted(found, key=lambda path: path.name, reverse=True)


def latest_run_dir(run_name: str | None = None, *, with_checkpoint: bool = False) -> Path:
    """The newest run called ``run_name``, or the newest of all runs.

    Args:
        run_name: None takes all runs.
        with_checkpoint: pass over runs that saved nothing yet.

    Raises:
        FileNotFoundError: if there is none; the message says how to make one.
    """
    newest = next((path for path in run_dirs(run_name) if not with_checkpoint or checkpoint_steps(path)), None)
    if newest is None:
        unsaved = run_dirs(run_name)
        if unsaved:
            raise FileNotFoundError(
                f"no run{f' called {run_name!r}' if run_name else ''} has a checkpoint yet, the newest is {unsaved[0]}; let it train for "
                "longer, or go on with it: gbla-rec train --resume, with the options it was started with"
            )
        names = sorted({path.parent.parent.name for path in (root() / "runs").glob("*/*/config.json")})
        kind = f" called {run_name!r}" if run_name else ""
        saved = " with a checkpoint" if with_checkpoint else ""
        raise FileNotFoundError(
            f"no run{kind}{saved} in {root() / 'runs'}, which has runs called: {', '.join(names) or 'none'}; "
            "train one with: gbla-rec train (--name is the run's name)"
        )
    return newest
