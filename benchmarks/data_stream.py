"""Tokens per second and core of the training stream: reading, planning, sharing among ranks and gathering.

``python benchmarks/data_stream.py`` (one process; keep ``OMP_NUM_THREADS=1`` and ``POLARS_MAX_THREADS=1`` for one core)
"""

import argparse
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from report import write_report

from gbla_rec.config import PrepareConfig, StreamConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare
from gbla_rec.data.stream import TrainingStream

NUM_EVENTS = 8_000_000
NUM_ITEMS = 100_000
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--history-lengths", type=int, nargs="+", default=[2048, 9, 131_072])
    parser.add_argument("--tokens", type=int, default=20_000_000, help="global tokens per repetition")
    arguments = parser.parse_args()
    # one core: no reader threads
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    rows = []
    for length in arguments.history_lengths:
        with tempfile.TemporaryDirectory() as directory:
            dataset = make_dataset(Path(directory), length)
            for world_size in (1, 8):
                rows.append(measure(dataset, length, world_size, arguments.tokens))
                print(rows[-1], flush=True)
    notes = (
        f"`TrainingStream` in one thread on {NUM_EVENTS:,} events, histories of one length with one context column, "
        "max_history_length = the history's length, otherwise the default StreamConfig with at least one history per batch; "
        f"median of {REPEATS} runs from the start, shard reading included. CPU seconds count all threads of the process, so "
        "tokens / CPU second is the rate of one core. With 8 ranks a rank plans the whole global batch and gathers an eighth: "
        "the rate counts global tokens."
    )
    print(write_report("data_stream", rows, "python " + shlex.join(sys.argv), notes))


def make_dataset(directory: Path, length: int) -> PreparedDataset:
    rng = np.random.default_rng(0)
    num_events = NUM_EVENTS // length * length
    users = np.repeat(np.arange(num_events // length), length)
    columns = {
        "item_id": rng.integers(0, NUM_ITEMS, num_events),
        "timestamp": rng.integers(0, 10**9, num_events),
        "action": rng.integers(0, 5, num_events),
    }
    pl.DataFrame({"user_id": users, **columns}).write_parquet(directory / "log.parquet")
    return prepare(PrepareConfig(name="benchmark", events=directory / "log.parquet", context_columns=("action",)), directory / "out")


def measure(dataset: PreparedDataset, length: int, world_size: int, tokens: int) -> dict[str, Any]:
    config = StreamConfig(max_history_length=length, tokens_per_batch=max(StreamConfig().tokens_per_batch, length))
    stream = TrainingStream(dataset, config, seed=0, world_size=world_size, context=["action"])
    runs = [run(stream, tokens) for _ in range(REPEATS)]
    return {
        "history length": length,
        "ranks": world_size,
        "tokens/batch": config.tokens_per_batch,
        "samples/batch": round(statistics.median(samples for _, _, samples in runs), 1),
        "Mtokens/s": round(statistics.median(rate for rate, _, _ in runs) / 1e6, 2),
        "Mtokens/CPU s": round(statistics.median(rate for _, rate, _ in runs) / 1e6, 2),
    }


def run(stream: TrainingStream, tokens: int) -> tuple[float, float, float]:
    """Global tokens per second, per CPU second, and this rank's samples per batch."""
    wall, cpu = time.perf_counter(), time.process_time()
    done = num_samples = num_batches = 0
    for batch in stream.batches():
        done += batch.global_num_tokens
        num_samples += len(batch.user_rows)
        num_batches += 1
        if done >= tokens:
            break
    return done / (time.perf_counter() - wall), done / (time.process_time() - cpu), num_samples / num_batches


if __name__ == "__main__":
    main()
