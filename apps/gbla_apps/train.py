"""``gbla-rec train``: train a recipe on the ranks that the launcher started (torchrun, TorchX), or on one."""

import sys
from collections.abc import Sequence

from gbla_apps import command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.training.trainer import train

DESCRIPTION = "Train a run. --resume goes on with the newest run of this name."


def main(arguments: Sequence[str]) -> None:
    """Parse and train."""
    rest = [argument for argument in arguments if argument != "--resume"]
    config = parse_run_config("train", DESCRIPTION, rest)
    with process_group() as device:
        train(config, device=device, resume=len(rest) < len(arguments))


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
