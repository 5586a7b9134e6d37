"""``gbla-rec prepare``: an event log, or a public dataset, becomes a prepared dataset."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import tyro

from gbla_apps import command_line
from gbla_rec import workspace
from gbla_rec.config import PrepareConfig
from gbla_rec.data.amazon import amazon_dataset
from gbla_rec.data.movielens import movielens_dataset
from gbla_rec.data.prepare import prepare
from gbla_rec.data.published import Convert, PublishedDataset
from gbla_rec.data.yambda import yambda_dataset
from gbla_rec.recipes import DATASETS

PUBLISHED: dict[str, Callable[[Path], PublishedDataset]] = {
    "amazon": amazon_dataset,
    "movielens": movielens_dataset,
    "yambda": yambda_dataset,
}
DESCRIPTION = (
    "Turn an event log into a prepared dataset in the workspace. "
    f"--recipe NAME takes a log that comes with the repository: {', '.join(DATASETS)}. "
    f"--dataset NAME --path DIR takes the published files of a public dataset: {', '.join(PUBLISHED)}. "
    "Both set the options below, and each can be set again."
)
CURE = "prepare longer histories, or another --split (events of one user at one time stay together: --split.ties)"
NEEDS = {
    "validation": f"train and evaluate choose checkpoints by them and refuse this dataset; {CURE}",
    "test": f"evaluate refuses this dataset; {CURE}",
}


def main(arguments: Sequence[str]) -> None:
    """Parse and prepare."""
    default, convert, rest = _take_source(arguments)
    config = tyro.cli(PrepareConfig, prog="gbla-rec prepare", description=DESCRIPTION, args=rest, default=default)
    dataset = prepare(config, workspace.dataset_dir(config.name), convert)
    manifest = dataset.manifest
    print(f"{dataset.path}: {manifest.num_users:,} users, {manifest.num_items:,} items, {manifest.num_events:,} events")
    print(f"users with targets: {manifest.num_validation_users:,} for validation, {manifest.num_test_users:,} for test")
    for part, count in (("validation", manifest.num_validation_users), ("test", manifest.num_test_users)):
        if count == 0:
            print(f"warning: no user has {part} targets and events before them: {NEEDS[part]}", file=sys.stderr)
    print(
        f"text columns: {', '.join(manifest.text_columns) or 'none (semantic IDs need --semantic-ids.embedding auto, behaviour or file)'}"
    )


def _take_source(arguments: Sequence[str]) -> tuple[PrepareConfig, Convert | None, list[str]]:
    """The defaults that ``--recipe`` or ``--dataset`` sets, what must be converted first, and the other arguments."""
    parser = argparse.ArgumentParser(prog="gbla-rec prepare", add_help=False, allow_abbrev=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--recipe")
    source.add_argument("--dataset")
    parser.add_argument("--path", type=Path)
    known, rest = parser.parse_known_args(arguments)
    for option, choices in (("recipe", DATASETS), ("dataset", PUBLISHED)):
        value = getattr(known, option)
        if value is not None and value not in choices:
            raise ValueError(
                f"--{option} must be one of {', '.join(sorted(choices))}, got {value!r}; a log of your own: --name NAME --events FILE, "
                f"public data: --dataset {'|'.join(PUBLISHED)} --path DIR"
            )
    if (known.dataset is None) != (known.path is None):
        raise ValueError(f"--dataset and --path must be given together, got --dataset {known.dataset} and --path {known.path}")
    if known.dataset is None:
        return (DATASETS[known.recipe]() if known.recipe else tyro.MISSING_NONPROP), None, rest
    published = PUBLISHED[known.dataset](known.path)
    print(f"{known.path}: {published.form}")
    return published.config, published.convert, rest


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
