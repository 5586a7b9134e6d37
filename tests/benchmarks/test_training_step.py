"""The step benchmark runs anywhere in its smoke sizes, without what the GPU machine lacks; its reading of traces is exact."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
WITHOUT_READERS = """
import runpy, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("polars", "rich", "tensorboard", "tyro"):
            raise ImportError(f"{name} is not there")

sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_smoke_run_writes_every_table_without_polars(tmp_path: Path) -> None:
    script = str(BENCHMARKS / "training_step.py")
    command = [sys.executable, "-c", WITHOUT_READERS, script, "--smoke", "--compile", "off", "--directory", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "training_step.json").read_text())
    assert [(row["pattern"], row["history"]) for row in report["rows"]] == [("SG", 64), ("SG", 128), ("SS", 64), ("SS", 128)]
    assert all(row["tokens/s"] > 0 and row["ms/step"] > 0 and row["first step (s)"] > 0 for row in report["rows"])
    assert "{" not in report["notes"].partition("```")[0], "a text that should have been filled in"
    # after each row, so that a run that is stopped leaves what it has
    assert done.stdout.count("training_step.md") == len(report["rows"])
    ratios = report["tables"]["Time of a step, one pattern against the other"]
    assert [row["SS / SG"] for row in ratios] == [report["rows"][2 + i]["ms/step"] / report["rows"][i]["ms/step"] for i in (0, 1)]


def event(category: str, name: str, start: float, stop: float, thread: int = 1, **arguments: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": stop - start, "pid": 1, "tid": thread, "args": arguments}


def test_kernels_belong_to_the_part_that_launched_them_or_its_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from collective_time import collectives
    from trace_parts import busy_seconds, kernel_seconds

    sequence = "Sequence number"
    backward = "autograd::engine::evaluate_function: MmBackward0"
    events = [
        event("user_annotation", "## forward 3 ##", 0, 100),
        event("user_annotation", "encoder.G", 10, 30),
        event("cpu_op", "aten::mm", 12, 20, **{sequence: 7}),
        event("cuda_runtime", "cudaLaunchKernel", 13, 14, correlation=1),
        event("user_annotation", "encoder.ffn", 30, 50),
        event("cpu_op", "aten::mm", 32, 40, **{sequence: 8}),
        event("cuda_driver", "cuLaunchKernelEx", 33, 34, correlation=2),
        event("cuda_runtime", "cudaLaunchKernel", 60, 61, correlation=3),
        # backward, in its own thread, in the reverse order
        event("cpu_op", backward, 200, 210, thread=2, **{sequence: 8}),
        event("cuda_runtime", "cudaLaunchKernel", 201, 202, thread=2, correlation=4),
        event("cpu_op", backward, 220, 230, thread=2, **{sequence: 7}),
        event("cpu_op", "aten::mm", 221, 229, thread=2, **{sequence: 99}),
        event("cuda_runtime", "cudaLaunchKernel", 222, 223, thread=2, correlation=5),
        event("user_annotation", "## optimizer 3 ##", 300, 320),
        event("cuda_runtime", "cudaLaunchKernel", 301, 302, correlation=6),
        *(
            event("kernel", name, 1_000 + start, 1_000 + stop, thread=7, correlation=correlation)
            for correlation, name, start, stop in [
                (1, "gemm", 0, 100),
                (2, "gemm", 100, 300),
                (3, "ncclDevKernel_SendRecv", 250, 650),
                (4, "gemm", 700, 1500),
                (5, "gemm", 1500, 3100),
                (6, "ncclDevKernel_AllReduce_Sum_f32", 4000, 7200),
            ]
        ),
    ]
    microseconds = {part: round(spent * 1e6) for part, spent in kernel_seconds(events).items()}
    assert microseconds == {"GBLA": 100 + 1600, "FFN": 200 + 800, "other": 400, "optimiser": 3200}
    (first, sent), (second, reduced) = collectives(events[::-1])
    assert (first, second) == ("all-to-all", "all-reduce") and [sent, reduced] == pytest.approx([400e-6, 3200e-6])
    assert busy_seconds(events) == pytest.approx((650 + 2400 + 3200) * 1e-6)


@pytest.mark.parametrize(
    ("world_size", "per_node", "expected"),
    [
        (1, None, "python"),
        (4, None, "torchrun --nproc-per-node 4"),
        (4, "4", "torchrun --nproc-per-node 4"),
        (16, "8", "torchrun --nnodes 2 --nproc-per-node 8"),
    ],
)
def test_a_report_names_what_started_its_ranks(
    monkeypatch: pytest.MonkeyPatch, world_size: int, per_node: str | None, expected: str
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from training_step import launcher

    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if per_node is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", per_node)
    assert launcher(world_size) == expected
