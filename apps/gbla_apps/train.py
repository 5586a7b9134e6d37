"""``gbla-rec train``: train a recipe on the ranks that the launcher started (torchrun, TorchX), or on one."""

import argparse
import sys
from collections.abc import Sequence

from gbla_apps import command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_apps.shared_options import shared_options
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.training.trainer import train

DESCRIPTION = (
    "Train a run. --resume goes on with the newest run of this name, or with an unfinished one like it if it saved nothing, and starts one "
    "where there is none; --resume-step N goes on from its checkpoint of step N and sets later ones aside."
)


def main(arguments: Sequence[str]) -> None:
    """Parse and train."""
    parser = argparse.ArgumentParser(prog="gbla-rec train", add_help=False, allow_abbrev=False)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--resume-step", type=int)
    with shared_options():
        options, rest = parser.parse_known_args(arguments)
        config = parse_run_config("train", DESCRIPTION, rest)
        training = config.training
        if training.profiled_steps.start > training.num_steps:
            rule = f"begin within the run, at step {training.num_steps} (--training.num-steps) or before"
            raise ValueError(f"--training.profile-steps must {rule}, got {training.profile_steps!r}")
    with process_group() as device:
        train(config, device=device, resume=options.resume, resume_step=options.resume_step)


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
