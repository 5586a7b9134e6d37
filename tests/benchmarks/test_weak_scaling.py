"""The step benchmark on several ranks: Zipf histories shared as training shares them, and waiting told from transfers."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_rec.config import StreamConfig
from gbla_rec.data.histories import sample_costs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
COSTS = StreamConfig(linear_cost=1.0, quadratic_cost=1e-3, target_cost=1.0)
LONGEST, TOKENS, TARGETS, WORLD_SIZE = 32_768, 65_536, 4, 4


pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


def test_lengths_are_zipf_in_every_stretch() -> None:
    from zipf_histories import zipf_lengths

    lengths = np.array(list(itertools.islice(zipf_lengths(LONGEST), 8192)))
    assert lengths.min() == 64 and lengths.max() == LONGEST
    for stretch in np.split(lengths, 4):
        for length in (128, 1024, 8192):
            assert (stretch >= length).sum() == pytest.approx(len(stretch) * 64 / length, abs=3)


def parts(balance: Any) -> list[list[Any]]:
    """The first three global batches, as the parts of their ranks."""
    from zipf_histories import zipf_batches

    ranks = [zipf_batches(LONGEST, TOKENS, TARGETS, 1000, COSTS, balance, rank=rank, world_size=WORLD_SIZE) for rank in range(WORLD_SIZE)]
    return [list(batch) for batch in itertools.islice(zip(*ranks, strict=True), 3)]


def test_ranks_share_the_same_global_batches_however_they_balance() -> None:
    from zipf_histories import zipf_lengths

    largest: dict[str, list[float]] = {}
    for balance in ("cost", "tokens", "none"):
        lengths, largest[balance] = zipf_lengths(LONGEST), []
        for batch in parts(balance):
            dealt = [np.diff(part.offsets) for part in batch]
            whole = np.concatenate(dealt)
            assert sorted(whole) == sorted(itertools.islice(lengths, len(whole)))
            # the next history did not fit
            assert 0.8 * WORLD_SIZE * TOKENS < whole.sum() <= WORLD_SIZE * TOKENS
            for part in batch:
                assert part.global_num_tokens == whole.sum() and part.global_num_targets == TARGETS * len(whole)
                assert len(part.items) == len(part.token_keys) == part.offsets[-1] and len(part.targets) == part.target_offsets[-1]
            costs = [sample_costs(rank, np.full(len(rank), TARGETS), COSTS).sum() for rank in dealt]
            largest[balance].append(max(costs) / np.mean(costs))
    assert np.mean(largest["cost"]) < np.mean(largest["tokens"]) < np.mean(largest["none"])


def test_what_a_rank_takes_longer_than_the_last_to_come_is_waiting() -> None:
    from collective_time import transfer_and_waiting

    # rank 1 is late for the first exchange, rank 0 for the reduction
    first = [("all-to-all", 5.0), ("all-reduce", 2.0), ("all-to-all", 1.0)]
    second = [("all-to-all", 1.0), ("all-reduce", 4.0), ("all-to-all", 1.5)]
    assert transfer_and_waiting([first, second]) == [
        {"all-to-all": 2.0, "all-reduce": 2.0, "waiting": 4.0},
        {"all-to-all": 2.0, "all-reduce": 2.0, "waiting": 2.5},
    ]
    assert transfer_and_waiting([first]) == [{"all-to-all": 6.0, "all-reduce": 2.0, "waiting": 0.0}]
    assert transfer_and_waiting([first, second[:2]]) == [
        {"all-to-all": 6.0, "all-reduce": 2.0, "waiting": None},
        {"all-to-all": 1.0, "all-reduce": 4.0, "waiting": None},
    ]


@pytest.mark.slow
def test_two_ranks_report_every_balance_and_each_rank(tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--smoke", "--compile", "off", "--patterns", "SG", "--history-lengths", "zipf", "--balance", "cost", "none"]
    command = [sys.executable, *launcher, str(BENCHMARKS / "training_step.py"), *options, "--steps", "1", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "weak_scaling_2.json").read_text())
    assert [(row["history"], row["balance"]) for row in report["rows"]] == [("Zipf to 128", "cost"), ("Zipf to 128", "none")]
    assert all(row["tokens/s"] > 0 and row["ms/step"] > 0 for row in report["rows"])
    ranks = report["tables"]["Ranks"]
    assert [(row["balance"], row["rank"]) for row in ranks] == [("cost", 0), ("cost", 1), ("none", 0), ("none", 1)]
    work = [row["TFLOP/step"] for row in ranks]
    assert abs(work[0] - work[1]) < abs(work[2] - work[3])
