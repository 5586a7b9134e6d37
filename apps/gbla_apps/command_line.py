"""Shared by the entry points: how a command ends, and which run it is about. Imports no library, so that every command starts."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from gbla_apps.endings import end, end_for_want_of_a_reader, end_with_traceback, is_first_rank, reader_is_gone
from gbla_rec import workspace
from gbla_rec.doctor.storage import workspace_cure

EXPECTED_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError, ModuleNotFoundError)
"""What a user can cause: shown as one line; anything else is our bug and keeps its traceback."""
TRACEBACK = "GBLA_REC_TRACEBACK"
"""Environment variable: if set, every error keeps its traceback."""


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Call ``main``; an error that the user can mend ends the program with one line and status 2.

    Each rank that meets one shows it, since it may be the only one; ``shared_options`` is for what all of them meet.
    Where nobody reads the output on, as in ``gbla-rec train --help | head``, it ends without a word, with the status of SIGPIPE.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _silence_libraries()
    try:
        _call(main, arguments)
    except EXPECTED_ERRORS as error:
        if isinstance(error, BrokenPipeError) and reader_is_gone():
            end_for_want_of_a_reader(error)
        if os.environ.get(TRACEBACK):
            end_with_traceback(error)
        rank = os.environ.get("RANK")
        cure = workspace_cure(error)
        print(f"error{f' on rank {rank}' if rank else ''}: {error}{f'; {cure}' if cure else ''}", file=sys.stderr)
        end(2, error)
    except KeyboardInterrupt as interrupt:
        print("interrupted; gbla-rec train --resume goes on from the last checkpoint, if one was saved", file=sys.stderr)
        end(130, interrupt)
    except Exception as error:
        end_with_traceback(error)


def _call(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Call ``main`` and write what it printed, also where it exits: an error of that is raised here, not at the interpreter's end."""
    try:
        main(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()


def print_once(text: str) -> None:
    """Print on the first rank only."""
    if is_first_rank():
        print(text)


def _silence_libraries() -> None:
    """Hide what torch and torchrec say about their own deprecations: nobody who runs a command can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|torchrec|gbla_rec)(\..*)?")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"fbgemm_gpu(\..*)?")
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--name`` or ``--run-dir``; without them the newest run is taken."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--name", "--recipe", dest="recipe", metavar="NAME", help="the newest run of this name (default: the newest of all runs)"
    )
    # not --run: torchrun takes it for the beginning of an option of its own
    group.add_argument("--run-dir", dest="run", metavar="DIR", type=Path, help="this run directory")


def chosen_run(options: argparse.Namespace) -> Path:
    """The run directory that the options of ``add_run_options`` name.

    Raises:
        ValueError: if ``--run-dir`` names the directory in which the runs of one name lie; the message has the newest.
    """
    run: Path | None = options.run
    if run is None:
        return workspace.latest_run_dir(options.recipe, with_checkpoint=True)
    inside = sorted(path.parent for path in run.glob("*/config.json"))
    if inside and not (run / "config.json").exists():
        raise ValueError(f"--run-dir must be one run, got {run} with {len(inside)}, the newest {inside[-1]}; or give --name {run.name}")
    return run
