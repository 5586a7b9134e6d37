"""``gbla-rec evaluate``: test a trained run and the baselines, print the tables, write results.json."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from gbla_apps import command_line
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import RESULTS, read_config
from gbla_rec.config import EvaluationConfig
from gbla_rec.evaluation.evaluate import evaluate
from gbla_rec.evaluation.table import results_tables


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
    options = parser.parse_args(arguments)
    if options.num_beams and min(options.num_beams) < 1:
        raise ValueError(f"--num-beams must be at least 1, got {min(options.num_beams)}")
    run_dir = command_line.chosen_run(options)
    command_line.print_once(f"run {run_dir}")
    settings = evaluation_settings(run_dir, options)
    with process_group() as device:
        results = evaluate(run_dir, device=device, settings=settings)
        if dist.get_rank() == 0:
            for table in results_tables(results):
                Console().print(table)
            print(f"written to {run_dir / RESULTS}")


def evaluation_settings(run_dir: Path, options: argparse.Namespace) -> EvaluationConfig:
    """The run's own settings with what the options add."""
    settings = read_config(run_dir).evaluation
    return replace(
        settings,
        both_histories=settings.both_histories or options.both_histories,
        beam_sweep=tuple(sorted(set(options.num_beams))) if options.num_beams else settings.beam_sweep,
    )


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
