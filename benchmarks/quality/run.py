"""Runs a table of experiments, in pieces: ``python -m benchmarks.quality.run TABLE --dataset D``, again until it says that all is done.

What stands after ``--`` are further options of every training.

Exit status: 0, all runs are trained and evaluated; 1, some failed; 2, the command is wrong; 3, there is more to do: run it again.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.quality.run_job import RunJob, table_jobs
from benchmarks.quality.scheduler import Outcome, Scheduler, State
from benchmarks.quality.tables import TABLES
from gbla_rec import workspace

ALL_DONE, SOME_FAILED, MORE_TO_DO = 0, 1, 3
TAIL_LINES = 12
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
OTHER_THREAD_VARIABLES = ("POLARS_MAX_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
LAUNCHER_PREFIXES = ("MASTER_", "TORCHELASTIC_", "GBLA_REC_METRICS_PORT")
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")


def main(arguments: Sequence[str]) -> int:
    """Parse, run until the time is over, and say what is left; returns the exit status."""
    own, extra = split_arguments(arguments)
    options = _parser().parse_args(own)
    try:
        jobs = chosen_jobs(options, extra)
        scheduler = Scheduler(
            jobs,
            num_parallel=options.jobs,
            seconds=60 * options.minutes,
            grace_seconds=options.grace,
            environments=list(process_environments(os.environ, options.jobs, options.gpus)),
            report=lambda line: print(line, flush=True),
        )
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    describe_start(jobs)
    return summarize(scheduler.run())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_table_options(parser)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default 1)")
    parser.add_argument("--minutes", type=float, default=9.0, help="end within so many minutes (default 9)")
    parser.add_argument("--grace", type=float, default=30.0, help="seconds before the end at which trainings save (default 30)")
    parser.add_argument("--gpus", nargs="+", metavar="INDEX", help="spread the processes over these GPUs (default: the first)")
    return parser


def add_table_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which runs: ``chosen_jobs`` reads them."""
    parser.add_argument("table", choices=sorted(TABLES), help="; ".join(f"{name}: {table.text}" for name, table in TABLES.items()))
    parser.add_argument("--dataset", required=True, help="a prepared and tokenized dataset of the workspace")
    parser.add_argument("--recipe", help="default: the table's, else the one named as the dataset")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these configurations of the table")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: those of the table")


def chosen_jobs(options: argparse.Namespace, extra: tuple[str, ...]) -> list[RunJob]:
    """The jobs that the options of ``add_table_options`` name; errors as ``table_jobs``."""
    return table_jobs(TABLES[options.table], options.dataset, recipe=options.recipe, only=options.only, seeds=options.seeds, extra=extra)


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """What stands before ``--``, and what stands after it."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return list(arguments[:place]), tuple(arguments[place + 1 :])


def process_environments(
    base: "os._Environ[str] | dict[str, str]", num_parallel: int, gpus: Sequence[str] | None
) -> Iterator[dict[str, str]]:
    """One environment per GPU: a process is a rank of no group, with one thread beside a GPU, else with its share of cores."""
    environment = {name: value for name, value in base.items() if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)}
    share = str(max(1, len(os.sched_getaffinity(0)) // max(1, num_parallel)))
    environment |= dict.fromkeys((*THREAD_VARIABLES, *OTHER_THREAD_VARIABLES), share)
    if gpus is not None or torch.cuda.is_available():
        # threads make neither launching nor collating faster, and the pools of many processes slow each other
        environment |= dict.fromkeys(THREAD_VARIABLES, "1")
    if gpus is None:
        yield environment
    for gpu in gpus or ():
        yield environment | {"CUDA_VISIBLE_DEVICES": gpu}


def describe_start(jobs: Sequence[RunJob]) -> None:
    """Print how many runs are done, and why a run that exists does not count."""
    done = sum(job.results is not None for job in jobs)
    print(f"{len(jobs)} runs in {workspace.root() / 'runs'}, {done} done", flush=True)
    for job in jobs:
        if job.run_dir() is None:
            try:
                run_dir = workspace.latest_run_dir(job.name)
            except FileNotFoundError:
                continue
            print(f"{job.name}: trained anew, {run_dir} has {job.obstacle(run_dir)}", flush=True)


def summarize(outcome: Outcome) -> int:
    """Print the state of all jobs and the end of the logs of those that failed; returns the exit status."""
    for name, reason in outcome.failures.items():
        log = outcome.logs[name]
        print(f"\n=== {name}: {reason}; the end of {log}:\n{tail(log)}")
    counts = [f"{outcome.count(state)} {state}" for state in State if outcome.count(state)]
    print(f"\n{', '.join(counts)}", flush=True)
    if outcome.failures:
        print("some runs failed; mend the cause and run the same command again, which leaves out what is done")
        return SOME_FAILED
    if outcome.count(State.DONE) < len(outcome.states):
        print("run the same command again to go on")
        return MORE_TO_DO
    return ALL_DONE


def tail(log: Path) -> str:
    """The last lines of a log."""
    return (
        "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if log.exists() else "    (no log)"
    )


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
