"""kernels/README.md: its example runs with the package alone, and it names every op."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gbla_kernels

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
PAGE = (KERNELS / "README.md").read_text()
ALONE = "import sys\nassert not {'gbla_rec', 'torchrec', 'polars'} & set(sys.modules), sys.modules\nassert norm_weight.grad.norm() > 0"


def test_the_example_runs_with_nothing_of_ours_beside_the_package():
    (example,) = re.findall(r"(?ms)^```python\n(.*?)^```", PAGE)
    found = subprocess.run(
        [sys.executable, "-c", f"{example}\n{ALONE}"], cwd=KERNELS, env=os.environ | {"PYTHONPATH": "."}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr


def test_the_page_names_everything_public():
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert set(gbla_kernels.__all__) <= named, set(gbla_kernels.__all__) - named
