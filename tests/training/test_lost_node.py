"""A node that is lost as a whole, launcher and all: what is left goes on with fewer ranks from the newest checkpoint."""

import dataclasses
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gbla_rec.checkpoint.rank_failure import SHARED_STORE_SWITCH
from gbla_rec.checkpoint.run_directory import checkpoints

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 2e-5
"""Relative, of losses: sums in another order, as in ``test_world_size``."""
LOST = "TEST_LOST_NODE"
PROGRAM = f"""
import os, pickle, signal, sys
from gbla_apps import command_line
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.training import trainer

config = pickle.load(open(sys.argv[1], "rb"))
forward = trainer.Trainer._forward


def forward_or_lose_the_node(self, batch):
    outputs = forward(self, batch)
    # the other node is in the middle of the step: it waits for this one in backward
    if "{LOST}" in os.environ and self.step + 1 == 6:
        for process in (os.getppid(), os.getpid()):
            os.kill(process, signal.SIGKILL)
    return outputs


def main(_):
    with process_group() as device:
        trainer.train(config, device=device, resume=True)


trainer.Trainer._forward = forward_or_lose_the_node
command_line.run(main, [])
"""


SECOND_NODE = """
import socket, sys, time
from torch.distributed import run

# the first node keeps the meeting point, so it must not be the one that is lost
while socket.socket().connect_ex(("localhost", int(sys.argv[1]))) != 0:
    time.sleep(0.05)
run.main(sys.argv[2:])
"""


def start_node(directory: Path, name: str, port: int, *launcher: str, **environment: str) -> subprocess.Popen[bytes]:
    """A torchrun of one process, as the scheduler starts one on each node; one node or two make the job."""
    # by default torchrun waits 30 s for more nodes, and 15 s before a silent one counts as lost
    patience = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
    meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "lost-node", "--rdzv-conf", patience]
    options = ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "2", "--monitor-interval", "0.1"]
    with (directory / name).open("wb") as output:
        return subprocess.Popen(
            [sys.executable, *launcher, *meeting, *options, str(directory / "program.py"), str(directory / "config")],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", SHARED_STORE_SWITCH: "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def train_undisturbed(rank: int, world_size: int, config: Any) -> None:
    import torch

    from gbla_rec.training.trainer import train

    train(config, device=torch.device("cpu"))


def losses_of(workspace: Path, name: str) -> list[float]:
    (path,) = workspace.glob(f"runs/{name}/*/metrics.jsonl")
    return [line["loss"] for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_node_that_is_left_ends_the_run_alone(run_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path) -> None:
    training = dataclasses.replace(tiny_run().training, num_steps=8, save_every=2, validate_every=8, keep_last=9)
    config = tiny_run(name="lost", training=training)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    nodes = [
        start_node(tmp_path, "left", port, "-m", "torch.distributed.run"),
        start_node(tmp_path, "lost", port, "-c", SECOND_NODE, str(port), **{LOST: "1"}),
    ]
    try:
        statuses = [node.wait(150) for node in nodes]
    finally:
        for node in nodes:
            # SIGTERM, which torchrun passes on to its ranks
            node.terminate()
            node.wait()
    output = (tmp_path / "left").read_text(errors="replace")
    assert statuses == [0, -9], output[-8000:]
    assert "lost the connection to another rank" in output and "resumed from" in output, output[-8000:]
    (run_dir,) = tiny_workspace.glob("runs/lost/*")
    assert {found.progress.step: found.progress.world_size for found in checkpoints(run_dir)} == {2: 2, 4: 2, 6: 1, 8: 1}
    run_ranks(train_undisturbed, 1, dataclasses.replace(config, name="undisturbed"))
    losses = losses_of(tiny_workspace, "lost")
    assert len(losses) == 8 and losses == pytest.approx(losses_of(tiny_workspace, "undisturbed"), rel=TOLERANCE)
