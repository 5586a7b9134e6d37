"""What the kernels of ``gated_linear_attention`` wait for: hardware counters of every launch of a forward and backward.

``python benchmarks/kernel_counters.py`` (bf16; the table goes to benchmarks/results). Needs Nsight Compute (``ncu``) and the right to
read counters. For registers and programs see ``kernel_resources.py``, for time in a graph ``linear_attention.py``.
"""

# L tokens, H heads, K = V head width (docs/shapes.md)

import argparse
import csv
import io
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from gpu_timing import DEVICE, arguments_or_exit
from linear_attention import LONG, PACKED, InputSet, triton_op
from op_calls import forward_backward
from report import write_report
from row_lengths import uniform, zipf

from gbla_kernels import JaggedLayout

LONE = uniform(1, 1536)
"""Near the length from which the layer is faster than softmax attention."""
ZIPF = zipf()
CASES = {case.name: case for case in (LONG, PACKED, LONE, ZIPF)}
WORK = ((LONG.name, 64), (PACKED.name, 64), (LONG.name, 128), (LONE.name, 64), (ZIPF.name, 128))
SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "Occupancy", "LaunchStats")
TIME = "gpu__time_duration.sum"
PERCENTAGES = {
    "memory (% of peak)": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "L1 (% of peak)": "l1tex__throughput.avg.pct_of_peak_sustained_active",
}
COUNTS = {
    "warps a scheduler": "smsp__warps_active.avg.per_cycle_active",
    "of these ready": "smsp__warps_eligible.avg.per_cycle_active",
}
PIPE_PREFIX, PIPE_SUFFIX = "sm__inst_executed_pipe_", ".avg.pct_of_peak_sustained_active"
STALL_PREFIX, STALL_SUFFIX = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"
LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"
NUM_STALLS = 4
MICROSECONDS = {"ns": 1e-3, "nsecond": 1e-3, "us": 1.0, "usecond": 1.0, "ms": 1e3, "msecond": 1e3}
NOTES = (
    "bf16, H = 8, K = V, elu1, normalised, both gates and the norm on views of one projection; one forward whose gradients are wanted, "
    "and its backward, after a first one. Each launch is replayed alone by Nsight Compute, clocks as they are, caches emptied: times are "
    "longer than in a graph. Busiest pipe: by instructions. Warps a scheduler: resident, and ready to issue. Waits: where a warp's time "
    "between two instructions goes, the largest shares; selected is issuing itself, so warps a scheduler x selected is the share of "
    "cycles in which one issues."
)

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "K"), help=argparse.SUPPRESS)
    arguments = arguments_or_exit(parser)
    if arguments.child is not None:
        run_once(arguments.child[0], int(arguments.child[1]))
        return
    profiler = shutil.which("ncu")
    if profiler is None:
        print(f"{Path(sys.argv[0]).name}: skipped, Nsight Compute (ncu) is not on the PATH")
        return
    rows: Rows = []
    for case, head_dim in WORK[:1] if arguments.quick else WORK:
        for row in kernel_rows(counters_of(profiler, case, head_dim)):
            rows.append({"rows x tokens": case, "K": head_dim, **row})
            print(rows[-1], flush=True)
    print(write_report("kernel_counters", rows, "python " + shlex.join(sys.argv), NOTES, directory=arguments.out))


def run_once(case_name: str, head_dim: int) -> None:
    """A forward and backward to compile, and another that is profiled."""
    case = CASES[case_name]
    op = triton_op(JaggedLayout.from_lengths(case.lengths).to(DEVICE))
    inputs = InputSet.random(case, head_dim, seed=0)
    forward_backward(op, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    forward_backward(op, inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def counters_of(profiler: str, case_name: str, head_dim: int) -> str:
    """The profiler's table of raw counters.

    Raises:
        RuntimeError: if it failed, with its last lines.
    """
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "counters.csv")
        sections = [word for section in SECTIONS for word in ("--section", section)]
        options = ["--clock-control", "none", "--profile-from-start", "off", "--page", "raw", "--csv", "--log-file", str(log), *sections]
        command = [profiler, *options, sys.executable, __file__, "--child", case_name, str(head_dim)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        table = log.read_text() if log.exists() else ""
        if done.returncode or TIME not in table:
            raise RuntimeError(f"{shlex.join(command)} failed: {(done.stderr + done.stdout + table)[-1000:]}")
        return table


def kernel_rows(table: str) -> Rows:
    """One row a launch, in order, from the profiler's CSV: a line of names, one of units, then the launches."""
    lines = [line for line in table.splitlines() if line.startswith('"')]
    names, units, *launches = csv.reader(io.StringIO("\n".join(lines)))
    unit_of = dict(zip(names, units, strict=True))
    return [described(dict(zip(names, launch, strict=True)), unit_of) for launch in launches]


def described(launch: Mapping[str, str], unit_of: Mapping[str, str]) -> dict[str, Any]:
    """What the table says of one launch; None for a counter that this profiler does not have."""
    values = {name: number for name, text in launch.items() if (number := as_number(text)) is not None}
    pipes = inside(values, PIPE_PREFIX, PIPE_SUFFIX)
    busiest = max(pipes, key=lambda name: pipes[name], default=None)
    stalls = inside(values, STALL_PREFIX, STALL_SUFFIX)
    latency = values.get(LATENCY) or sum(stalls.values())
    largest = sorted(stalls, key=lambda name: stalls[name], reverse=True)[:NUM_STALLS]
    return {
        "kernel": short_name(launch["Kernel Name"]),
        "us": values[TIME] * MICROSECONDS[unit_of[TIME]],
        **{column: values.get(metric) for column, metric in PERCENTAGES.items()},
        "busiest pipe (%)": None if busiest is None else f"{busiest} {pipes[busiest]:.0f}",
        **{column: values.get(metric) for column, metric in COUNTS.items()},
        "waits": ", ".join(f"{name.replace('_', ' ')} {stalls[name] / latency:.0%}" for name in largest),
    }


def short_name(signature: str) -> str:
    """The name of a kernel without its template arguments and parameters."""
    return signature.removeprefix("void ").split("<")[0].split("(")[0]


def inside(values: Mapping[str, float], prefix: str, suffix: str) -> dict[str, float]:
    """The values whose names begin and end so, by what stands between."""
    return {name[len(prefix) : -len(suffix)]: value for name, value in values.items() if name.startswith(prefix) and name.endswith(suffix)}


def as_number(text: str) -> float | None:
    """The number that the profiler wrote, thousands separated or not."""
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


if __name__ == "__main__":
    main()
