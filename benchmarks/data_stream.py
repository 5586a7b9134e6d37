"""Tokens per second and core of the training data: the stream (reading, planning, sharing among ranks, gathering) and collate.

``OMP_NUM_THREADS=1 POLARS_MAX_THREADS=1 python benchmarks/data_stream.py`` (one process, one core)
"""

import argparse
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa
import torch
from report import write_report

from gbla_rec.config import EmbeddingConfig, ModelConfig, PrepareConfig, StreamConfig, with_sample_costs
from gbla_rec.data.batch import Collator
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare
from gbla_rec.data.stream import TrainingStream

NUM_EVENTS = 8_000_000
NUM_ITEMS = 100_000
WIDTHS = (256, 256, 256, 256)
REPEATS = 5
ENVIRONMENT = ("OMP_NUM_THREADS", "POLARS_MAX_THREADS")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history-lengths", type=int, nargs="+", default=[2048, 9, 131_072])
    parser.add_argument("--items", type=int, nargs="+", default=[NUM_ITEMS, 5_000_000], help="catalogue sizes; the first at every length")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="global tokens per repetition")
    arguments = parser.parse_args()
    # one core: no reader threads
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    torch.set_num_threads(1)
    rows = []
    cases = [(length, arguments.items[0]) for length in arguments.history_lengths]
    cases += [(arguments.history_lengths[0], num_items) for num_items in arguments.items[1:]]
    for length, num_items in cases:
        with tempfile.TemporaryDirectory() as directory:
            dataset = make_dataset(Path(directory), length, num_items)
            for world_size in (1, 8):
                rows.append(measure(dataset, length, world_size, arguments.tokens))
                print(rows[-1], flush=True)
    notes = (
        f"`TrainingStream` alone, and with `Collator` (the rows of two hash functions, the KeyedJaggedTensor, the JaggedLayout), in one "
        f"thread on {NUM_EVENTS:,} events, histories of one length with one context column, max_history_length = the history's length, "
        "otherwise the default StreamConfig with at least one history per batch; "
        f"median of {REPEATS} runs from the start, shard reading included. CPU seconds count all threads of the process, so "
        "tokens / CPU second is the rate of one core; slowest run: of those with collate. With 8 ranks a rank plans the whole global "
        "batch and gathers and collates an eighth: the rate counts global tokens."
    )
    environment = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
    print(write_report("data_stream", rows, " ".join([*environment, "python", shlex.join(sys.argv)]), notes))


def make_dataset(directory: Path, length: int, num_items: int) -> PreparedDataset:
    rng = np.random.default_rng(0)
    num_events = NUM_EVENTS // length * length
    users = np.repeat(np.arange(num_events // length), length)
    columns = {
        "item_id": rng.integers(0, num_items, num_events),
        "timestamp": rng.integers(0, 10**9, num_events),
        "action": rng.integers(0, 5, num_events),
    }
    pl.DataFrame({"user_id": users, **columns}).write_parquet(directory / "log.parquet")
    return prepare(PrepareConfig(name="benchmark", events=directory / "log.parquet", context_columns=("action",)), directory / "out")


def measure(dataset: PreparedDataset, length: int, world_size: int, tokens: int) -> dict[str, Any]:
    config = StreamConfig(max_history_length=length, tokens_per_batch=max(StreamConfig().tokens_per_batch, length))
    config = with_sample_costs(config, ModelConfig(), WIDTHS)
    stream = TrainingStream(dataset, config, seed=0, world_size=world_size, context=["action"])
    embedding = EmbeddingConfig(context_features=("action",))
    collator = Collator(embedding, dataset.items()["item_id"].to_list(), num_code_levels=len(WIDTHS), world_size=world_size)
    alone = [run(stream, None, tokens) for _ in range(REPEATS)]
    collated = [run(stream, collator, tokens) for _ in range(REPEATS)]
    return {
        "history length": length,
        "items": dataset.manifest.num_items,
        "ranks": world_size,
        "tokens/batch": config.tokens_per_batch,
        "samples/batch": round(statistics.median(one.samples for one in alone), 1),
        "stream: Mtokens/s": round(statistics.median(one.per_second for one in alone) / 1e6, 2),
        "stream: Mtokens/CPU s": round(statistics.median(one.per_cpu_second for one in alone) / 1e6, 2),
        "with collate: Mtokens/s": round(statistics.median(one.per_second for one in collated) / 1e6, 2),
        "with collate: Mtokens/CPU s": round(statistics.median(one.per_cpu_second for one in collated) / 1e6, 2),
        "slowest run: Mtokens/CPU s": round(min(one.per_cpu_second for one in collated) / 1e6, 2),
    }


class Rate(NamedTuple):
    """Global tokens per second and per CPU second, and this rank's samples per batch."""

    per_second: float
    per_cpu_second: float
    samples: float


def run(stream: TrainingStream, collator: Collator | None, tokens: int) -> Rate:
    wall, cpu = time.perf_counter(), time.process_time()
    done = num_samples = num_batches = 0
    for batch in stream.batches():
        if collator is not None:
            collator(batch)
        done += batch.global_num_tokens
        num_samples += len(batch.user_rows)
        num_batches += 1
        if done >= tokens:
            break
    return Rate(done / (time.perf_counter() - wall), done / (time.process_time() - cpu), num_samples / num_batches)


if __name__ == "__main__":
    main()
