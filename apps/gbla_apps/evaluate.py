"""``gbla-rec evaluate``: test a trained run and the baselines, print the tables, write results.json."""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from gbla_apps import command_line
from gbla_apps.shared_options import shared_options
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import RESULTS, describe_run, read_config
from gbla_rec.config import EvaluationConfig
from gbla_rec.evaluation.evaluate import evaluate
from gbla_rec.evaluation.rank import scores_of
from gbla_rec.evaluation.table import results_tables

JOINT_SETTINGS = {"joint_beams": "--joint-beams", "beam_weight": "--beam-weight"}
"""Fields of ``EvaluationConfig`` by which a joint score ranks, and their options."""


def main(arguments: Sequence[str]) -> None:
    """Parse and evaluate."""
    parser = argparse.ArgumentParser(prog="gbla-rec evaluate", description="Evaluate a trained run on its test split.")
    command_line.add_run_options(parser)
    parser.add_argument(
        "--num-beams",
        type=int,
        nargs="+",
        metavar="N",
        help="test with these numbers of beams too, one row each; the checkpoint is chosen at the configured number",
    )
    parser.add_argument(
        "--both-histories",
        action="store_true",
        help="a second column: items of the own history removed where the run keeps them, kept where it removes them",
    )
    parser.add_argument(
        "--joint-beams",
        type=int,
        metavar="N",
        help="the joint score ranks the items of this number of beams, in place of the run's; the checkpoint is chosen with it too",
    )
    parser.add_argument(
        "--beam-weight",
        type=float,
        metavar="W",
        help="of the log-probability in the joint score, in place of the run's; the checkpoint is chosen with it too",
    )
    with shared_options():
        options = parser.parse_args(arguments)
        require_bounds(options)
    run_dir = command_line.chosen_run(options)
    # reads the run's config: what is wrong with that may be wrong on one node alone
    command_line.print_once(describe_run(run_dir))
    with shared_options():
        settings = evaluation_settings(run_dir, options)
    with process_group() as device:
        results = evaluate(run_dir, device=device, settings=settings)
        if dist.get_rank() == 0:
            console = Console()
            for table in results_tables(results, console.width):
                console.print(table)
            print(f"written to {run_dir / RESULTS}")


def require_bounds(options: argparse.Namespace) -> None:
    """``ValueError`` that names the option, for values that no run can be evaluated with."""
    if options.num_beams and min(options.num_beams) < 1:
        raise ValueError(f"--num-beams must be at least 1, got {min(options.num_beams)}")
    if options.joint_beams is not None and options.joint_beams < 1:
        raise ValueError(f"--joint-beams must be at least 1, got {options.joint_beams}; leave it out to take the run's own number")
    # not a number, which compares false, is refused too
    if options.beam_weight is not None and not 0 <= options.beam_weight < math.inf:
        raise ValueError(
            f"--beam-weight must be finite and not negative, got {options.beam_weight}; 0 ranks by the item-level score alone, and "
            "without the option the run's own weight is taken"
        )


def evaluation_settings(run_dir: Path, options: argparse.Namespace) -> EvaluationConfig:
    """The run's own settings with what the options add, and with those of the joint score that the options replace."""
    config = read_config(run_dir)
    settings = config.evaluation
    joint = {name: value for name in JOINT_SETTINGS if (value := getattr(options, name)) is not None}
    for name, value in joint.items():
        if "joint" not in scores_of(config.model):
            raise ValueError(
                f"{JOINT_SETTINGS[name]} must be given for a run of objective 'joint' only, got {value} for {run_dir} of objective "
                f"{config.model.objective!r}; leave it out, or choose another run"
            )
    if options.joint_beams is not None and options.joint_beams < settings.num_beams:
        raise ValueError(
            f"--joint-beams must be at least the run's EvaluationConfig.num_beams, got {options.joint_beams} for {run_dir} of "
            f"{settings.num_beams}; give {settings.num_beams} or more"
        )
    return replace(
        settings,
        both_histories=settings.both_histories or options.both_histories,
        beam_sweep=tuple(sorted(set(options.num_beams))) if options.num_beams else settings.beam_sweep,
        **joint,
    )


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
