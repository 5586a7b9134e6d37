"""Times of GPU work by CUDA-graph replay, and the ceilings that they are held against, measured in the same run.

A graph holds one call per input set, on sets that together are several times the L2 cache, and every call writes memory of its own:
no call finds its inputs in the cache, and no output stays there to be overwritten. Launch gaps are those of a graph.
"""

import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from report import results_directory
from torch.autograd import DeviceType

Call = Callable[[], Any]
Figure = float | str | None
"""A measured figure, the text of the error that prevented it, or None where it was not asked for."""
T = TypeVar("T")

DEVICE = "cuda"
L2_MULTIPLE = 4
MAX_INPUT_SETS = 256
MIN_GRAPH_MS = 1.0
"""Short work is repeated inside the graph up to this, so that the edges of a replay do not count."""
MAX_CALLS = 256
REPLAY_SECONDS = 0.15
"""Replays of one measurement, together."""
MIN_REPLAYS, MAX_REPLAYS = 3, 50
MEGABYTE = 1e6


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reached in this run."""

    copy_bytes_per_ms: float
    """Bytes read plus bytes written by a large device-to-device copy."""
    matmul_flop_per_ms: float
    """A bf16 product of two 8192 x 8192 matrices."""

    @classmethod
    def measure(cls) -> "Ceilings":
        """Copy 1 GiB; multiply two matrices of random numbers."""
        source = torch.randn(2**29, device=DEVICE, dtype=torch.bfloat16)
        copy_ms = _eager_ms(partial(torch.empty_like(source).copy_, source))
        left, right = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
        matmul_ms = graph_ms([partial(torch.matmul, left, right)])
        return cls(2 * 2**30 / copy_ms, 2 * 8192**3 / matmul_ms)

    def __str__(self) -> str:
        return (
            f"copy {self.copy_bytes_per_ms / 1e6:.0f} GB/s (read + written), 8192^3 bf16 matmul {self.matmul_flop_per_ms / 1e9:.0f} TFLOP/s"
        )


def graph_ms(calls: Sequence[Call]) -> float:
    """Median milliseconds of one call, from replays of a CUDA graph that holds all of them.

    Args:
        calls: the same work on different inputs; what a call returns is kept until the graph is complete. A call that runs a
            backward pass must return detached tensors.

    Raises:
        RuntimeError: if the work cannot be captured.
    """
    calls = list(calls)
    estimate = _warm_up_ms(calls[0])
    num_calls = max(len(calls), min(math.ceil(MIN_GRAPH_MS / estimate), MAX_CALLS))
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for i in range(num_calls):
            kept.append(calls[i % len(calls)]())
    graph.replay()
    torch.cuda.synchronize()
    num_replays = min(max(round(REPLAY_SECONDS * 1e3 / (estimate * num_calls)), MIN_REPLAYS), MAX_REPLAYS)
    starts, stops = ([torch.cuda.Event(enable_timing=True) for _ in range(num_replays)] for _ in range(2))
    for start, stop in zip(starts, stops, strict=True):
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    median = statistics.median(start.elapsed_time(stop) for start, stop in zip(starts, stops, strict=True))
    del kept
    graph.reset()
    return median / num_calls


def _eager_ms(call: Call, *, calls: int = 10, rounds: int = 5) -> float:
    """Median milliseconds of one call among ``calls`` in a row, without a graph: there a copy takes a slower engine."""
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times)


def _warm_up_ms(call: Call) -> float:
    """Compile, tune and make handles outside the graph; milliseconds of a later eager call, at least 1 microsecond."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
        start.record()
        call()
        stop.record()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return max(start.elapsed_time(stop), 1e-3)


def attempt(measure: Callable[..., T], *arguments: Any) -> T | str:
    """``measure(*arguments)``, or the error's text in its place: a peer that fails does not end the benchmark."""
    try:
        return measure(*arguments)
    except Exception as error:
        text = _first_cause(error)
        print(f"  failed: {text}", file=sys.stderr, flush=True)
    # the frames of the error held tensors
    gc.collect()
    torch.cuda.empty_cache()
    return text[:100].replace("|", "/")


def _first_cause(error: BaseException) -> str:
    # a graph whose capture failed raises once more when it is closed
    while error.__context__ is not None and not error.__suppress_context__:
        error = error.__context__
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def ratio(numerator: Figure, denominator: Figure) -> float | None:
    """``numerator / denominator`` where both were measured."""
    if isinstance(numerator, float | int) and isinstance(denominator, float | int):
        return numerator / denominator
    return None


def input_sets(make: Callable[[int], T], bytes_per_set: int) -> list[T]:
    """``[make(0), make(1), ...]``: as many sets as are needed to exceed the L2 cache several times."""
    l2_bytes = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return [make(seed) for seed in range(min(math.ceil(L2_MULTIPLE * l2_bytes / bytes_per_set), MAX_INPUT_SETS))]


def peak_megabytes(call: Call) -> float:
    """Most memory that one eager call held beyond what was there before, results included, in MB."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / MEGABYTE


def first_call_seconds(call: Call) -> float:
    """Wall seconds of a call, compilation and tuning included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def kernel_names(call: Call) -> list[str]:
    """What one call launches on the GPU, in order, memory operations included."""
    call()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    launched = [event for event in profile.events() if event.device_type == DeviceType.CUDA]
    if not launched:
        raise RuntimeError("the profiler saw no kernel")
    return [event.name for event in sorted(launched, key=lambda event: event.time_range.start)]


def host_microseconds(call: Call, *, calls: int = 50, rounds: int = 11) -> float:
    """Median microseconds that the host spends in one eager call, without waiting for the GPU.

    The work must be so small that its queue never fills.
    """
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times)


def arguments_or_exit(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with the options that all GPU benchmarks have; without a GPU, say so and exit with status 0."""
    parser.add_argument("--quick", action="store_true", help="few sizes; under a minute")
    parser.add_argument("--out", type=Path, help="directory of the results (default: benchmarks/results; with --quick in the workspace)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: skipped, it needs a CUDA GPU")
        sys.exit(0)
    arguments.out = results_directory(arguments.out, is_whole=not arguments.quick)
    return arguments
