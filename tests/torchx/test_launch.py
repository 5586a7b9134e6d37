"""The command of the README, really launched: TorchX -> torchrun -> two ranks of gbla_apps.train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["--training.num-steps", "2", "--training.validate-every", "2", "--training.save-every", "2", "--training.validation-users", "200"]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchx_trains_on_two_ranks(workspace, tmp_path):
    # local_cwd finds `python` and `torchx` on PATH
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

    def run(*command):
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert finished.returncode == 0, f"{command}\n{finished.stdout[-3000:]}\n{finished.stderr[-6000:]}"

    for step in ("prepare", "tokenize"):
        run("python", "-m", f"gbla_apps.{step}", "--recipe", "movielens_small")
    scheduler = ["-s", "local_cwd", "-cfg", f"log_dir={tmp_path / 'logs'}"]
    run("torchx", "run", *scheduler, "torchx/components.py:train", "-j", "1x2", "--", "--recipe", "movielens_small", *SHORT)
    (checkpoint,) = workspace.glob("runs/movielens_small/*/checkpoints/*")
    # one file of shards per rank
    assert len(list(checkpoint.glob("*.distcp"))) == 2
