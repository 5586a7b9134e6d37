"""The examples run, and show what they promise."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", [1, 2])
def test_torchrec_dropin_loads_the_old_checkpoint_and_learns_order(ranks: int) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    finished = subprocess.run(
        [sys.executable, *launcher, str(EXAMPLES / "torchrec_dropin.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "old checkpoint: 3 tensors, all loaded: True" in finished.stdout
    before, after = (float(share) for share in re.findall(r"([\d.]+)%", finished.stdout))
    assert after > before + 20


def test_the_dropin_changes_five_lines() -> None:
    source = (EXAMPLES / "torchrec_dropin.py").read_text()
    assert sum(line.endswith("# changed") for line in source.splitlines()) == 5
