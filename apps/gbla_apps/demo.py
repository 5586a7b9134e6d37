"""``gbla-rec demo``: from a public event log to recommended films, each step a command that can be run alone."""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from gbla_apps import command_line
from gbla_rec import workspace
from gbla_rec.recipes import recipe

RECIPE = "movielens_small"


def main(arguments: Sequence[str]) -> None:
    """Prepare and tokenize what is not there yet; train, evaluate and recommend."""
    parser = argparse.ArgumentParser(prog="gbla-rec demo", description="Prepare, tokenize, train, evaluate and recommend on MovieLens.")
    parser.add_argument("--ranks", type=int, default=default_ranks(), help="processes that train together (default: GPUs, or 2 on CPU)")
    parser.add_argument("--user", default="414", help="whom to recommend to (default: the user with the longest history)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    config = recipe(RECIPE)
    if not workspace.dataset_dir(config.dataset).exists():
        step("an event log becomes sorted histories", ["-m", "gbla_apps.prepare", "--recipe", RECIPE])
    if not workspace.semantic_ids_dir(config.dataset).exists():
        step("items get semantic IDs", ["-m", "gbla_apps.tokenize", "--recipe", RECIPE])
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks), "-m"]
    step("a sharded hybrid encoder learns", [*ranks, "gbla_apps.train", "--recipe", RECIPE])
    step("beam search over the whole catalogue, beside baselines", [*ranks, "gbla_apps.evaluate", "--recipe", RECIPE])
    step("the next films of one user", ["-m", "gbla_apps.recommend", "--recipe", RECIPE, "--user", options.user])
    print(f"\nall of it took {time.monotonic() - started:.0f} s")


def default_ranks() -> int:
    """One rank a GPU; on CPU two, so that the tables are really sharded."""
    return torch.cuda.device_count() or min(2, os.cpu_count() or 1)


def step(meaning: str, command: list[str]) -> None:
    """Run one command as its own process, like a user would; a failure ends the demo with its status."""
    print(f"\n== {meaning}\n$ {shlex.join(['python', *command])}", flush=True)
    threads = {} if torch.cuda.is_available() else {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    finished = subprocess.run([sys.executable, *command], env={**os.environ, **threads}, check=False)
    if finished.returncode:
        raise SystemExit(finished.returncode)


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
