"""Parsing shared by the entry points: a recipe's name, then typed options generated from the config dataclasses."""

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from gbla_rec import workspace
from gbla_rec.config import RunConfig
from gbla_rec.recipes import RECIPES, recipe

EXPECTED_ERRORS = (ValueError, OSError, NotImplementedError, FloatingPointError, ModuleNotFoundError)
"""What a user can cause: shown as one line; anything else is our bug and keeps its traceback."""
TRACEBACK = "GBLA_REC_TRACEBACK"
"""Environment variable: if set, every error keeps its traceback."""


def run(main: Callable[[Sequence[str]], None], arguments: Sequence[str]) -> None:
    """Call ``main``; an error that the user can mend ends the program with one line and status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    _silence_libraries()
    try:
        main(arguments)
    except EXPECTED_ERRORS as error:
        if os.environ.get(TRACEBACK):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def _silence_libraries() -> None:
    """Hide what torch and torchrec say about their own deprecations: nobody who runs a command can act on it."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|torchrec|gbla_rec)(\..*)?")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"fbgemm_gpu(\..*)?")
    for name in ("torchrec", "torch.fx._symbolic_trace"):
        logging.getLogger(name).setLevel(logging.ERROR)


def parse_run_config(program: str, description: str, arguments: Sequence[str]) -> RunConfig:
    """``--recipe NAME`` and overrides of its fields, e.g. ``--model.encoder.pattern SG``."""
    name, rest = _take_recipe(arguments)
    default = recipe(name or "movielens_small")
    text = f"{description} --recipe NAME chooses the defaults below: {', '.join(sorted(RECIPES))}."
    config = (tyro.conf.FlagConversionOff,)
    return tyro.cli(RunConfig, prog=f"gbla-rec {program}", description=text, args=rest, default=default, config=config)


def _take_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    known, rest = parser.parse_known_args(arguments)
    return known.recipe, rest


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """``--recipe`` or ``--run``; without them the newest run is taken."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--recipe", metavar="NAME", help="the newest run of this name (default: the newest of all runs)")
    group.add_argument("--run", metavar="DIR", type=Path, help="this run directory")


def chosen_run(options: argparse.Namespace) -> Path:
    """The run directory that the options of ``add_run_options`` name."""
    run: Path | None = options.run
    return run if run is not None else workspace.latest_run_dir(options.recipe)
