"""``gbla-rec evaluate``: test a trained run and the baselines, print the table, write results.json."""

import argparse
import sys
from collections.abc import Sequence

import torch.distributed as dist
from rich.console import Console

from gbla_apps import command_line
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import RESULTS
from gbla_rec.evaluation.evaluate import evaluate
from gbla_rec.evaluation.table import results_table


def main(arguments: Sequence[str]) -> None:
    """Parse and evaluate."""
    parser = argparse.ArgumentParser(prog="gbla-rec evaluate", description="Evaluate a trained run on its test split.")
    command_line.add_run_options(parser)
    run_dir = command_line.chosen_run(parser.parse_args(arguments))
    command_line.print_once(f"run {run_dir}")
    with process_group() as device:
        results = evaluate(run_dir, device=device)
        if dist.get_rank() == 0:
            Console().print(results_table(results))
            print(f"written to {run_dir / RESULTS}")


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
