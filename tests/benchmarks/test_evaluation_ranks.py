"""Times of an evaluation on several numbers of ranks: real launches on the CPU, and what is kept of one that is cut off."""

import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
CHILD = """
import json, os, sys, time
from pathlib import Path
ranks, path, does_second = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[4] == "True"
found = {"loaded": time.time(), "seconds": [2.0], "items": 80, "users": 60, "digest": "same", "metrics": {}}
if ranks == 4 or does_second:
    path.write_text(json.dumps(found))
Path(sys.argv[3], f"pid.{ranks}").write_text(str(os.getpid()))
time.sleep(0 if ranks == 4 else 100)
"""


def measure_without_end(rank, run_dir, pids, options, does_second):
    """The benchmark, in a process group of its own; the launch of two ranks does not end."""
    os.setsid()
    sys.path.insert(0, str(BENCHMARKS))
    import evaluation_ranks

    def launched(run_dir, ranks, path):
        return [sys.executable, "-c", CHILD, str(ranks), str(path), str(pids), str(does_second)]

    evaluation_ranks.END_SECONDS, evaluation_ranks.torchrun = 0.0, launched
    sys.argv = ["evaluation_ranks.py", "--run-dir", str(run_dir), "--ranks", "1", "2", "4", *options]
    evaluation_ranks.main()


def train(rank, world_size, config):
    import torch

    from gbla_rec.training.trainer import train

    return train(config, device=torch.device("cpu"))


def script(rank, path, options):
    """``python path *options``, in a process that has made the slow imports."""
    sys.argv = [str(path), *options]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")


def rows_of(directory):
    return json.loads((directory / "evaluation_ranks.json").read_text())["rows"]


@pytest.fixture
def run_of_nothing(tiny_run, workspace):
    """A run directory with a config, which the report reads."""
    from gbla_rec.checkpoint.run_directory import create_run

    create_run(workspace / "runs" / "tiny" / "1", tiny_run(), "", "")
    return workspace / "runs" / "tiny" / "1"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_one_and_two_ranks_of_a_trained_run_are_timed_and_agree(run_ranks, launch_ranks, tiny_run, tiny_workspace, tmp_path):
    config = tiny_run()
    (run_dir,) = run_ranks(train, 1, dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=2)))
    options = ["--run-dir", str(run_dir), "--ranks", "1", "2", "--directory", str(tmp_path)]
    ((status, output),) = launch_ranks(script, 1, BENCHMARKS / "evaluation_ranks.py", options, timeout_s=200.0)
    assert status == 0, output[-3000:]
    one, two = rows_of(tmp_path)
    assert (one["ranks"], two["ranks"]) == (1, 2) and one["passes"] == two["passes"] == 2
    assert one["same as 1"] and two["same as 1"], "of all users, not of those who warm up"
    assert one["speed-up over 1"] == 1 and one["evaluation (s)"] > 0 and two["start (s)"] > two["evaluation (s)"]
    notes = json.loads((tmp_path / "evaluation_ranks.json").read_text())["notes"]
    assert "60 users, 80 items, 10 beams" in notes
    # the larger number of ranks first, a line for each pass
    said = [line for line in output.splitlines() if "pass" in line]
    assert [line.split(":")[0] for line in said] == ["2 rank(s), pass 1", "2 rank(s), pass 2", "1 rank(s), pass 1", "1 rank(s), pass 2"]


@pytest.mark.timeout(90)
@pytest.mark.parametrize(("is_told", "does_second"), [(True, False), (True, True), (False, True)])
def test_a_launch_that_is_cut_off_keeps_what_was_measured_and_leaves_no_process(
    start_rank, run_of_nothing, workspace, tmp_path, is_told, does_second
):
    committed = (BENCHMARKS / "results" / "evaluation_ranks.json").read_bytes()
    options = [] if is_told else ["--seconds", "4"]
    process, output = start_rank(measure_without_end, run_of_nothing, tmp_path, options, does_second)
    second = tmp_path / "pid.2"
    while not (second.exists() and second.read_text()):
        assert process.is_alive(), output.read_text()
        time.sleep(0.02)
    if is_told:
        # as timeout does, to all of them
        os.killpg(process.pid, signal.SIGTERM)
    process.join(30)
    errors = output.read_text()
    measured = [2, 4] if does_second else [4]
    assert process.exitcode == 1 and f"cut off at 2 rank(s); measured: {', '.join(map(str, measured))}" in errors, errors
    rows = rows_of(workspace / "benchmarks")
    assert [row["ranks"] for row in rows] == measured and all(row["passes"] == 1 for row in rows)
    assert rows[-1][f"speed-up over {measured[0]}"] == 1.0
    assert (BENCHMARKS / "results" / "evaluation_ranks.json").read_bytes() == committed
    with pytest.raises(ProcessLookupError):
        os.kill(int(second.read_text()), 0)
    assert not (tmp_path / "pid.1").exists(), "no launch follows one that was cut off"


def test_a_launch_that_fails_is_an_error(benchmarks_on_path, monkeypatch, tmp_path):
    import evaluation_ranks

    monkeypatch.setattr(evaluation_ranks, "torchrun", lambda *_: [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(subprocess.CalledProcessError, match="status 3"):
        evaluation_ranks.launch(tmp_path, 2, evaluation_ranks.Limit(float("inf")))


def test_ranks_that_find_another_ranking_are_not_called_the_same(benchmarks_on_path):
    from evaluation_ranks import described, row_against

    from gbla_rec.evaluation.rank import RankedUsers

    def found(ranked, ranks, *seconds):
        users = RankedUsers(np.arange(2), np.array(ranked), np.array([3, 5]), np.array([0, 1, 2]), np.ones(2, np.int64))
        return {"ranks": ranks, "seconds": seconds, "start": 1.0, **described({"generative": users}, (2,))}

    one = found([[3, 4], [4, 5]], 1, 9.0, 8.0)
    assert one["users"] == 2 and one["metrics"]["generative"]["Recall@2"] == 1.0
    row = row_against(one, found([[3, 4], [4, 5]], 2, 5.0, 6.0, 5.5))
    assert row["same as 1"] and row["speed-up over 1"] == 1.6 and row["passes"] == 3
    # the metrics are the same, the items are not
    assert not row_against(one, found([[3, 6], [4, 5]], 2, 5.0))["same as 1"]
