"""Makes the datasets of table ``long_range``: ``python -m benchmarks.quality.long_range long_range_100 long_range_1000``.

Writes each event log into the workspace, then runs ``gbla_apps.prepare`` and ``gbla_apps.tokenize`` on it; a dataset that exists is
left alone.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.quality.planted_recall import PlantedRecall, event_log
from gbla_rec import workspace

RECIPE = "own_data"
TASKS = {
    "long_range_30": PlantedRecall(distance=30),
    "long_range_100": PlantedRecall(distance=100),
    "long_range_1000": PlantedRecall(distance=1_000, num_train=16_384),
    "long_range_10000": PlantedRecall(distance=10_000, num_train=8_192, num_test=1_024),
    "long_range_to_100": PlantedRecall(distance=100, shortest_distance=10, num_train=65_536),
    "long_range_to_1000": PlantedRecall(distance=1_000, shortest_distance=30, num_train=65_536),
    "long_range_to_10000": PlantedRecall(distance=10_000, shortest_distance=30, num_train=32_768, num_test=1_024),
    "long_range_order_30": PlantedRecall(distance=30, binding="order"),
    "long_range_order_100": PlantedRecall(distance=100, binding="order"),
}
"""By the name of the dataset; those named ``to`` are trained at all distances up to the one that is evaluated."""
TOKENS_PER_BATCH = {30: 4_096, 100: 32_768, 1_000: 131_072, 10_000: 262_144}
"""By distance: 64 histories or more, and 26 of the longest; where training distances are drawn about 520, 440 and 150."""
EMBEDDING_DIM = 32
LOGS = "event_logs"
EMBEDDINGS = "item_embeddings.parquet"


def main(arguments: Sequence[str]) -> int:
    """Parse, then make each dataset; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.long_range", description=__doc__)
    parser.add_argument("datasets", nargs="*", metavar="DATASET", help=f"of {', '.join(TASKS)} (default: all)")
    parser.add_argument("--num-train", type=int, help="training histories (default: those of the task)")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.datasets) - set(TASKS))
    if unknown:
        parser.error(f"DATASET must be one of {', '.join(TASKS)}, got {', '.join(unknown)}")
    for name in options.datasets or TASKS:
        task = TASKS[name] if options.num_train is None else replace(TASKS[name], num_train=options.num_train)
        if workspace.semantic_ids_dir(name).exists():
            print(f"{name}: is there already")
        else:
            make_dataset(name, task)
    return 0


def training_options(name: str) -> tuple[str, ...]:
    """Options of ``gbla_apps.train`` (and ``tokenize``) on top of ``RECIPE`` for the dataset ``name``: a small model, one cut a history.

    Raises:
        ValueError: if it is none of these datasets.
    """
    if name not in TASKS:
        raise ValueError(f"dataset must be one of {', '.join(TASKS)}, got {name!r}")
    task = TASKS[name]
    context = ("--model.embedding.context-features", "key") if task.binding == "event" else ()
    # where lengths differ, targets have no place in common but the end, and histories to be evaluated are long enough to be cut, too
    cuts = () if task.shortest_distance is None else ("--stream.cuts", "newest", "--stream.exclude-evaluated", "True")
    semantic_ids = ("--semantic-ids.embedding", "file", "--semantic-ids.embedding-file", str(workspace.root() / LOGS / name / EMBEDDINGS))
    return (
        *semantic_ids,
        *("--semantic-ids.num-levels", "1", "--semantic-ids.codebook-width", "128"),
        *("--model.embedding.rows-per-table", "65536", "--model.embedding.dim", "32", "--model.embedding.num-hashes", "1", *context),
        # an item and a key are all that an event is
        *("--model.embedding.semantic-code-dim", "0"),
        *("--model.encoder.model-dim", "64", "--model.encoder.num-heads", "2", "--model.encoder.ffn-dim", "128"),
        *("--model.encoder.dropout", "0.0", "--model.decoder.dropout", "0.0", "--model.decoder.num-heads", "2"),
        # one stratum of cuts for each target; ties in time move the cut to the target
        *("--stream.min-history-length", str(task.earliest_target), "--stream.max-history-length", str(task.training_length)),
        *("--stream.targets-per-cut", "1", "--stream.max-cuts-per-history", str(task.num_queries), *cuts),
        *("--stream.tokens-per-batch", str(TOKENS_PER_BATCH[task.distance])),
        *("--optimizer.learning-rate", "5e-3", "--optimizer.warmup-steps", "100"),
        *("--training.num-steps", "1500", "--training.validate-every", "250", "--training.save-every", "250"),
        *("--evaluation.cutoffs", "1", "4", "--evaluation.num-beams", "16", "--evaluation.exclude-history", "False"),
    )


def make_dataset(name: str, task: PlantedRecall) -> None:
    """Write the log of ``task``, prepare it as dataset ``name`` and tokenize it.

    Raises:
        subprocess.CalledProcessError: if one of the commands failed; it said why.
    """
    directory = workspace.root() / LOGS / name
    write_log(task, directory)
    if not workspace.dataset_dir(name).exists():
        _run("prepare", *prepare_options(name, task, directory / "events"))
    _run("tokenize", "--recipe", RECIPE, "--name", name, "--dataset", name, *training_options(name))
    shutil.rmtree(directory / "events")


def write_log(task: PlantedRecall, directory: Path) -> None:
    """Write ``events/*.parquet`` and the item embeddings into ``directory``."""
    shutil.rmtree(directory, ignore_errors=True)
    (directory / "events").mkdir(parents=True)
    for number, part in enumerate(event_log(task)):
        part.write_parquet(directory / "events" / f"part-{number:05}.parquet")
    # far apart: every item is a cluster of its own
    vectors = np.random.default_rng(task.seed).normal(size=(len(task.item_ids), EMBEDDING_DIM))
    pl.DataFrame({"item_id": task.item_ids, "vector": list(vectors)}).write_parquet(directory / EMBEDDINGS)


def prepare_options(name: str, task: PlantedRecall, events: Path) -> list[str]:
    """Options of ``gbla_apps.prepare``: users are told apart by the time of their target."""
    context = ["--context-columns", "key"] if task.binding == "event" else []
    times = ["--split.validation-time", str(task.validation_time), "--split.test-time", str(task.test_time)]
    return ["--name", name, "--events", str(events), *context, "--split.kind", "temporal", *times]


def _run(app: str, *options: str) -> None:
    subprocess.run((sys.executable, "-m", f"gbla_apps.{app}", *options), check=True)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
