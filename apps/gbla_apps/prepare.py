"""``gbla-rec prepare``: an event log becomes a prepared dataset."""

import argparse
import sys
from collections.abc import Sequence

import tyro

from gbla_apps import command_line
from gbla_rec import workspace
from gbla_rec.config import PrepareConfig
from gbla_rec.data.prepare import prepare
from gbla_rec.recipes import DATASETS

DESCRIPTION = (
    "Turn an event log into a prepared dataset in the workspace. "
    f"--recipe NAME takes a log that comes with the repository: {', '.join(DATASETS)}."
)


def main(arguments: Sequence[str]) -> None:
    """Parse and prepare."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", choices=sorted(DATASETS))
    known, rest = parser.parse_known_args(arguments)
    default = DATASETS[known.recipe]() if known.recipe else tyro.MISSING_NONPROP
    config = tyro.cli(PrepareConfig, prog="gbla-rec prepare", description=DESCRIPTION, args=rest, default=default)
    dataset = prepare(config, workspace.dataset_dir(config.name))
    manifest = dataset.manifest
    print(f"{dataset.path}: {manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_events:,} events")
    print(f"users with targets: {manifest.num_validation_users:,} for validation, {manifest.num_test_users:,} for test")


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
