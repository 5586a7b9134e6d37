"""The config of a run from the command line: a recipe's name, then typed options generated from the config dataclasses."""

import argparse
from collections.abc import Sequence

import tyro

from gbla_rec.config import RunConfig
from gbla_rec.recipes import RECIPES, recipe


def parse_run_config(program: str, description: str, arguments: Sequence[str]) -> RunConfig:
    """``--recipe NAME`` and overrides of its fields, e.g. ``--model.encoder.pattern SG``."""
    name, rest = _take_recipe(program, arguments)
    is_help = any(argument in ("-h", "--help") for argument in rest)
    if name is None and not is_help:
        raise ValueError(f"--recipe must be given, one of {', '.join(sorted(RECIPES))}; for a log of your own: --recipe own_data")
    default = recipe(name or "own_data")
    text = f"{description} --recipe NAME (one of {', '.join(sorted(RECIPES))}) is required and chooses the defaults below."
    config = (tyro.conf.FlagConversionOff,)
    return tyro.cli(RunConfig, prog=f"gbla-rec {program}", description=text, args=rest, default=default, config=config)


def _take_recipe(program: str, arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    parser = argparse.ArgumentParser(prog=f"gbla-rec {program}", add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe")
    known, rest = parser.parse_known_args(arguments)
    return known.recipe, rest
