"""Wall time and peak memory of ``prepare`` on a generated log; memory must not grow with the log.

Each log has long-tailed users and items, int64 ids beyond 2^53 and random times, and is generated in chunks.
``python benchmarks/prepare.py --events 10000000 50000000``
"""

import argparse
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from report import write_report

CHUNK = 1_000_000
FIRST_ID = 1 << 60
SAMPLE_SECONDS = 0.05
SHIFT = 1_000
"""Of Zipf-Mandelbrot: without it one user would have 5 % of all events."""
CHILD = """
import sys
from pathlib import Path
from gbla_rec.config import PrepareConfig
from gbla_rec.data.prepare import prepare
events, output, shard = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
dataset = prepare(PrepareConfig(name="benchmark", events=events, context_columns=("action",), max_events_per_shard=shard), output)
print(dataset.manifest.num_users, dataset.manifest.num_items, len(dataset.manifest.shards))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, nargs="+", default=[10_000_000, 50_000_000], help="log sizes")
    parser.add_argument("--users", type=int, default=500_000)
    parser.add_argument("--items", type=int, default=300_000)
    parser.add_argument("--max-events-per-shard", type=int, default=2_000_000)
    parser.add_argument("--directory", type=Path, default=None, help="where the logs go (default: the system's temporary directory)")
    arguments = parser.parse_args()
    rows = []
    for num_events in arguments.events:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            rows.append(measure(Path(directory), num_events, arguments.users, arguments.items, arguments.max_events_per_shard))
        print(rows[-1], flush=True)
    notes = (
        "`prepare` in a process of its own on generated Parquet logs: users and items Zipf-Mandelbrot "
        f"(1 / (rank + {SHIFT:,})), {arguments.users:,} and {arguments.items:,} possible ids from 2^60 on, one context column of 5 values, "
        f"uniform times, leave-last split, max_events_per_shard={arguments.max_events_per_shard:,}. One run per size. Peak RSS is the "
        "kernel's high-water mark (VmHWM) of that process with its libraries; it counts pages of the log that the reader maps, which the "
        f"system can drop at any time. The anonymous part (RssAnon, sampled every {SAMPLE_SECONDS} s) cannot be dropped."
    )
    print(write_report("prepare", rows, "python " + shlex.join(sys.argv), notes))


def measure(directory: Path, num_events: int, num_users: int, num_items: int, shard: int) -> dict[str, Any]:
    log = directory / "log.parquet"
    write_log(log, num_events, num_users, num_items)
    start = time.perf_counter()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(log), str(directory / "out"), str(shard)], stdout=subprocess.PIPE, text=True)
    peak_disk = peak_rss = peak_anonymous = 0

    def sample() -> None:
        nonlocal peak_disk, peak_rss, peak_anonymous
        while child.poll() is None:
            peak_rss = max(peak_rss, memory_of(child.pid, "VmHWM"))
            peak_anonymous = max(peak_anonymous, memory_of(child.pid, "RssAnon"))
            peak_disk = max(peak_disk, disk_usage(directory) - log.stat().st_size)
            time.sleep(SAMPLE_SECONDS)

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, _ = child.communicate()
    seconds = time.perf_counter() - start
    sampler.join()
    if child.returncode:
        raise RuntimeError(f"prepare failed with exit status {child.returncode}")
    users, items, shards = map(int, output.split())
    return {
        "events": num_events,
        "users": users,
        "items": items,
        "shards": shards,
        "log (MB)": round(log.stat().st_size / 1e6),
        "prepared (MB)": round(disk_usage(directory / "out") / 1e6),
        "peak temporary disk (MB)": round(peak_disk / 1e6),
        "wall (s)": round(seconds, 1),
        "events/s": round(num_events / seconds),
        "peak RSS (MB)": round(peak_rss / 1e6),
        "of it anonymous (MB)": round(peak_anonymous / 1e6),
    }


def write_log(path: Path, num_events: int, num_users: int, num_items: int) -> None:
    rng = np.random.default_rng(0)
    writer = None
    for first in range(0, num_events, CHUNK):
        size = min(CHUNK, num_events - first)
        table = pa.table(
            {
                "user_id": FIRST_ID + zipf_mandelbrot(rng, size, num_users),
                "item_id": FIRST_ID + zipf_mandelbrot(rng, size, num_items),
                "timestamp": rng.integers(1_500_000_000, 1_700_000_000, size),
                "action": pa.array(np.array(["click", "like", "play", "save", "skip"])[rng.integers(0, 5, size)]),
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


def zipf_mandelbrot(rng: np.random.Generator, size: int, num_values: int) -> np.ndarray:
    """Ranks with probability proportional to 1 / (rank + SHIFT), so that the largest user stays within reason."""
    return np.floor(SHIFT * ((1 + num_values / SHIFT) ** rng.random(size) - 1)).astype(np.int64)


def memory_of(pid: int, field: str) -> int:
    """Bytes of a line of the process's status; 0 once it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field)), 0)


def disk_usage(directory: Path) -> int:
    total = 0
    for path in directory.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:
            continue
    return total


if __name__ == "__main__":
    main()
