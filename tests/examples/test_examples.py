"""The examples run, and show what they promise."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

DROPIN = Path(__file__).resolve().parents[2] / "examples" / "torchrec_dropin.py"


def assert_loads_and_learns(output: str) -> None:
    assert "old checkpoint: 3 tensors, all loaded: True" in output
    before, after = (float(share) for share in re.findall(r"([\d.]+)%", output))
    assert after > before + 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrec_dropin_loads_the_old_checkpoint_and_learns_order() -> None:
    finished = subprocess.run(
        [sys.executable, str(DROPIN)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert_loads_and_learns(finished.stdout)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_torchrec_dropin_does_so_on_two_ranks(launch_ranks: Any) -> None:
    def example(rank: int, path: str) -> None:
        spec = importlib.util.spec_from_file_location("torchrec_dropin", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules["torchrec_dropin"] = module
        spec.loader.exec_module(module)
        module.NUM_STEPS = 150
        module.main()

    (status, output), (other_status, other_output) = launch_ranks(example, 2, str(DROPIN), timeout_s=280.0)
    assert status == other_status == 0, output + other_output
    assert_loads_and_learns(output)


def test_the_dropin_changes_eight_lines() -> None:
    source = DROPIN.read_text()
    assert sum(line.endswith("# changed") for line in source.splitlines()) == 8
