"""What is written of the kernels is of those that are there."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
OP = ROOT / "kernels" / "gbla_kernels" / "linear_attention"
COMPILED = re.compile(r"^@triton\.jit.*\ndef (\w+_kernel)\(", re.MULTILINE)
KERNELS = {name for path in OP.glob("*.py") for name in COMPILED.findall(path.read_text())}


def test_the_design_names_every_kernel_and_no_other() -> None:
    assert KERNELS and set(re.findall(r"`(\w+_kernel)`", (OP / "README.md").read_text())) == KERNELS


def test_the_committed_resources_are_of_these_kernels() -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "kernel_resources.json").read_text())
    assert {row["kernel"] for row in report["rows"]} == KERNELS, "make the report anew: it needs no GPU"
