"""What TorchX really launches: one node of two ranks, two nodes of one rank that meet on this machine, and every component in turn."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import polars as pl
import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = """--recipe own_data --name tiny --dataset tiny --semantic-ids.embedding-dim 8 --semantic-ids.min-codebook-width 8
    --semantic-ids.dedup-width 8 --semantic-ids.kmeans-iterations 5 --model.embedding.rows-per-table 64 --model.embedding.dim 8
    --model.embedding.semantic-code-dim 4 --model.encoder.model-dim 16 --model.encoder.num-heads 2 --model.encoder.pattern SG
    --model.encoder.ffn-dim 16 --model.decoder.num-heads 2 --model.decoder.ffn-dim 16 --stream.tokens-per-batch 300
    --stream.max-history-length 100 --stream.targets-per-cut 4 --training.log-every 1 --training.validation-users 20""".split()


def launch(tmp_path, *component_and_arguments):
    # local_cwd finds `python` and `torchx` on PATH
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = ["torchx", "run", "-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'logs'}", *component_and_arguments]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process, timeout_s=120, ok=True):
    try:
        output, _ = process.communicate(timeout=timeout_s)
    finally:
        process.terminate()
    assert (process.returncode == 0) == ok, output[-8000:]
    return output


def steps(num_steps):
    return ["--training.num-steps", str(num_steps), "--training.validate-every", str(num_steps), "--training.save-every", str(num_steps)]


def write_log(directory):
    """A log of 30 users, 40 items and 360 events, in files whose names a shell would change."""
    rows = [(f"u{user}", f"i{(user + k) % 40}", 1000 * user + k) for user in range(30) for k in range(12)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").write_csv(events := directory / "the $$ log.csv")
    titles = [f"thing {i // 4} no {i}" for i in range(40)]
    pl.DataFrame({"item_id": [f"i{i}" for i in range(40)], "title": titles}).write_csv(items := directory / "items.csv")
    return ["--events", str(events), "--items", str(items)]


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return str(probe.getsockname()[1])


def the_only_checkpoint(workspace):
    (progress,) = workspace.glob("runs/tiny/*/checkpoints/*/progress.json")
    return progress.parent, json.loads(progress.read_text())


def fetch_metrics(port, process, timeout_s=90):
    """The metrics page, once it shows a step, while the run is going on."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            page = urllib.request.urlopen(f"http://localhost:{port}/metrics", timeout=5).read().decode()
        except OSError:
            page = ""
        if "gbla_rec_step " in page:
            return dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        time.sleep(0.02)
    process.terminate()
    return pytest.fail(f"no metrics while the run went on\n{process.communicate(timeout=60)[0][-8000:]}")


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_one_node_trains_on_two_ranks_and_serves_its_metrics_meanwhile(tiny_workspace, tmp_path):
    port = free_port()
    arguments = ["-j", "1x2", "--metrics_port", port, "--", *TINY, *steps(40)]
    process = launch(tmp_path, "torchx/components.py:train", *arguments)
    metrics = fetch_metrics(port, process)
    finish(process)
    assert 1 <= float(metrics["gbla_rec_step"]) <= 40 and float(metrics["gbla_rec_num_steps"]) == 40
    assert float(metrics["gbla_rec_train_loss"]) > 0 and float(metrics["gbla_rec_train_tokens_per_second"]) > 0
    checkpoint, progress = the_only_checkpoint(tiny_workspace)
    assert (progress["step"], progress["world_size"]) == (40, 2)
    # one file of shards per rank
    assert len(list(checkpoint.glob("*.distcp"))) == 2


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_nodes_meet_at_the_first_one_and_train_one_run(tiny_workspace, tmp_path):
    arguments = ["-j", "2x1", "--rdzv_port", free_port(), "--", *TINY, *steps(2)]
    finish(launch(tmp_path, "torchx/components.py:train", *arguments))
    _, progress = the_only_checkpoint(tiny_workspace)
    assert (progress["step"], progress["world_size"]) == (2, 2)
    # each node is a torchrun of its own
    assert sorted(path.name for path in tmp_path.glob("logs/*/*/train/*")) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_component_in_turn_leads_from_a_log_to_an_evaluated_run(workspace, tmp_path):
    def component(name, *arguments):
        return launch(tmp_path, f"torchx/components.py:{name}", *arguments)

    # beside the others: it needs nothing of them
    benchmark = component("benchmark", "--script", "training_step", "--", "--smoke", "--compile", "off", "--patterns", "SG")
    prepared = finish(component("prepare", "--", "--name", "tiny", *(log := write_log(tmp_path))))
    assert f"{workspace}/datasets/tiny: 30 users, 40 items, 360 events" in prepared
    # what an app could not do, torchx run could not do either
    assert "datasets/tiny exists; delete it" in finish(component("prepare", "--", "--name", "tiny", *log), ok=False)
    finish(component("tokenize", "--", *TINY))
    table = pl.read_parquet(workspace / "semantic_ids/tiny/table.parquet")
    assert table.height == 40 and not table.select(pl.col("^code_.*$")).is_duplicated().any()
    finish(component("train", "--", *TINY, *steps(2)))
    checkpoint, progress = the_only_checkpoint(workspace)
    assert (progress["step"], progress["world_size"]) == (2, 1)
    run_dir = checkpoint.parents[1]
    assert f"written to {run_dir}/results.json" in finish(component("evaluate", "-j", "1x2", "--", "--name", "tiny"))
    results = json.loads((run_dir / "results.json").read_text())
    assert (results["checkpoint"], results["protocol"]["users"]) == ("step_00000002", 30)
    assert list(results["methods"]) == ["tiny", "most-popular", "item-kNN"]
    # each rank ranked a share of the users, and none was lost or ranked twice
    assert sorted(pl.read_parquet(run_dir / "per_user.parquet")["user_row"]) == list(range(30))
    assert sorted(path.name for path in tmp_path.glob("logs/*/*/torchelastic/evaluate/*/attempt_0/*")) == ["0", "1"]
    finish(benchmark)
    report = json.loads((workspace / "benchmarks/training_step.json").read_text())
    assert report["command"] == "python benchmarks/training_step.py --smoke --compile off --patterns SG"
    assert [row["history"] for row in report["rows"]] == [64, 128] and all(row["tokens/s"] > 0 for row in report["rows"])
