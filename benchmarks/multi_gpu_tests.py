"""Run the tests of several GPUs, and write which of them passed on how many.

``python benchmarks/multi_gpu_tests.py`` on two GPUs or more, some of the tests on four. ``GBLA_REC_TEST_CPU_RANKS=4`` plays them with
gloo ranks. That report, and one with a test that failed, goes to the workspace, not over the committed one.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch
from report import results_directory, write_report

ROOT = Path(__file__).resolve().parents[1]
CPU_RANKS = "GBLA_REC_TEST_CPU_RANKS"
FEWEST = 2
NOTES = (
    "Tests with the marker multi_gpu on {devices}: {counts}. Seconds are those of a test and of what it is the first to ask for: tests "
    "share their launches of torchrun, and the first waits for most of them."
)


def main() -> int:
    """Parse, test, write; returns pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tests", type=Path, default=ROOT / "tests" / "multi_gpu", help="file or directory of tests")
    parser.add_argument("--directory", type=Path, help="of the report (default: the committed results, or the workspace)")
    options = parser.parse_args()
    cpu_ranks = os.environ.get(CPU_RANKS)
    num_gpus = torch.cuda.device_count()
    if cpu_ranks is None and num_gpus < FEWEST:
        print(f"{Path(sys.argv[0]).name}: skipped, it needs {FEWEST} CUDA GPUs")
        return 0
    with tempfile.TemporaryDirectory() as directory:
        xml = Path(directory, "results.xml")
        command = [sys.executable, "-m", "pytest", "-m", "multi_gpu", "-p", "no:cacheprovider", f"--junitxml={xml}", str(options.tests)]
        status = subprocess.run(command, cwd=ROOT, check=False).returncode
        rows = read_results(xml) if xml.exists() else []
    if not rows:
        print(f"no test ran: pytest ended with status {status}")
        return status or 1
    devices = f"{num_gpus} GPUs" if cpu_ranks is None else f"{cpu_ranks} gloo ranks"
    outcomes = [row["outcome"].split(":")[0] for row in rows]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in dict.fromkeys(outcomes))
    where = results_directory(options.directory, is_whole=cpu_ranks is None and status == 0)
    print(write_report("multi_gpu_tests", rows, shown_command(cpu_ranks), NOTES.format(devices=devices, counts=counts), directory=where))
    return status


def shown_command(cpu_ranks: str | None) -> str:
    """From the root of the repository."""
    play = "" if cpu_ranks is None else f"{CPU_RANKS}={cpu_ranks} "
    return f"{play}python {shlex.join(sys.argv)}"


def read_results(xml: Path) -> list[dict[str, Any]]:
    """One row a test: file, name, ``passed``, ``failed`` or ``skipped: why``, and seconds."""
    rows = []
    for case in ElementTree.parse(xml).iter("testcase"):
        skipped = case.find("skipped")
        has_failed = case.find("failure") is not None or case.find("error") is not None
        outcome = "failed" if has_failed else "passed" if skipped is None else f"skipped: {skipped.get('message', '')}"
        place = case.get("classname", "").rpartition(".")[2]
        rows.append({"file": place, "test": case.get("name"), "outcome": outcome, "s": round(float(case.get("time", 0)), 1)})
    return rows


if __name__ == "__main__":
    raise SystemExit(main())
