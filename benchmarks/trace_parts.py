"""Kernel time by part of a training step, from a Chrome trace of torch.profiler.

A kernel belongs to the innermost named range around its launch. Backward runs outside of the ranges: there, autograd names the
operation by the sequence number of its forward, which ran in a range.
"""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PARTS = {
    "tables": "tables",
    "## start_sparse_data_dist": "tables",
    "## wait_sparse_data_dist": "tables",
    "input": "input",
    "encoder.S": "SA",
    "encoder.W": "windowed SA",
    "encoder.G": "GBLA",
    "encoder.ffn": "FFN",
    "decoder": "decoder",
    "loss": "decoder",
    "CompiledFunction": "dense part, compiled",
    "## optimizer": "optimiser",
    "## zero_grad": "optimiser",
    "## copy_batch_to_gpu": "copies",
}
"""Part by the beginning of a range's name."""
OTHER = "other"
DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCH_CATEGORIES = ("cuda_runtime", "cuda_driver")
BACKWARD = "autograd::engine::evaluate_function"

Event = dict[str, Any]


def read_trace(path: Path) -> list[Event]:
    """The complete events of a trace, ``.json`` or ``.json.gz``."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [event for event in json.loads(data)["traceEvents"] if event.get("ph") == "X"]


def kernel_seconds(events: list[Event]) -> dict[str, float]:
    """Seconds of kernels and copies by part."""
    part_of_launch = _parts_of_launches(events)
    seconds: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in DEVICE_CATEGORIES:
            seconds[part_of_launch.get(event["args"].get("correlation"), OTHER)] += event["dur"] / 1e6
    return dict(seconds)


def busy_seconds(events: Iterable[Event]) -> float:
    """Seconds in which the device ran at least one kernel or copy."""
    spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in DEVICE_CATEGORIES)
    busy, end = 0.0, float("-inf")
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6


def _part(name: str) -> str | None:
    # the longest first: "decoder" must not hide a longer name that begins with it
    return next((PARTS[prefix] for prefix in sorted(PARTS, key=len, reverse=True) if name.startswith(prefix)), None)


def _parts_of_launches(events: Iterable[Event]) -> dict[int, str]:
    """Part of each launch, by correlation id."""
    by_thread: dict[Any, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("cat") in ("cpu_op", "user_annotation", *LAUNCH_CATEGORIES):
            by_thread[event["pid"], event["tid"]].append(event)
    part_of_sequence: dict[int, str] = {}
    launches: dict[int, list[Event]] = {}
    for thread in by_thread.values():
        # an outer range before what it holds
        thread.sort(key=lambda event: (event["ts"], -event["dur"]))
        stack: list[Event] = []
        for event in thread:
            while stack and event["ts"] >= stack[-1]["ts"] + stack[-1]["dur"]:
                stack.pop()
            if event["cat"] in LAUNCH_CATEGORIES:
                launches[event.get("args", {}).get("correlation", -1)] = list(stack)
                continue
            stack.append(event)
            sequence = event.get("args", {}).get("Sequence number", -1)
            is_backward = any(outer["name"].startswith(BACKWARD) for outer in stack)
            if sequence >= 0 and not is_backward and (part := _innermost(stack, {})) is not None:
                part_of_sequence.setdefault(sequence, part)
    return {correlation: _innermost(stack, part_of_sequence) or OTHER for correlation, stack in launches.items()}


def _innermost(stack: list[Event], part_of_sequence: dict[int, str]) -> str | None:
    for event in reversed(stack):
        if (part := _part(event["name"])) is not None:
            return part
        if event["name"].startswith(BACKWARD):
            part = part_of_sequence.get(event.get("args", {}).get("Sequence number", -1))
            if part is not None:
                return part
    return None
