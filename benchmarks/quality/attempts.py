"""What was run for a job, when, and how long it took: one JSON file in the job's directory."""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

ATTEMPTS = "attempts.json"
RUN_TIME = "%Y%m%dT%H%M%S_%fZ"
"""How run directories are called."""


@dataclass(frozen=True)
class Attempt:
    """One process of a job.

    Attributes:
        stage: ``train`` or ``evaluate``.
        ended: UTC time.
        seconds: wall clock.
        share_seconds: wall clock over the processes that ran beside it: what it cost of the machine.
        status: exit status, negative for a signal.
        was_stopped: it was asked to end before it was done.
        machine: what it ran on.
    """

    stage: str
    ended: str
    seconds: float
    share_seconds: float
    status: int
    was_stopped: bool
    machine: str

    def ended_after(self, run_started: str) -> bool:
        """Whether it ended after a run began, whose directory is called ``run_started``."""
        return datetime.fromisoformat(self.ended) >= datetime.strptime(run_started, RUN_TIME).replace(tzinfo=UTC)


def add_attempt(directory: Path, attempt: Attempt) -> None:
    """Append ``attempt``; the file is complete at any time."""
    path = directory / ATTEMPTS
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(known) for known in [*attempts(directory), attempt]], indent=1) + "\n")
    temporary.replace(path)


def attempts(directory: Path) -> list[Attempt]:
    """The attempts of a job, oldest first."""
    path = directory / ATTEMPTS
    return [Attempt(**fields) for fields in json.loads(path.read_text())] if path.exists() else []


def longest_seconds(directories: Iterable[Path], stage: str) -> float | None:
    """The longest time that ``stage`` took, stopped or not, in any of the jobs; None if it never ran."""
    return max((attempt.seconds for directory in directories for attempt in attempts(directory) if attempt.stage == stage), default=None)


@cache
def machine() -> str:
    """GPUs, or the processor, and the cores of this machine."""
    cores = f"{len(os.sched_getaffinity(0))} cores"
    if shutil.which("nvidia-smi") is None:
        return f"{platform.machine()}, {cores}"
    listed = subprocess.run(("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"), capture_output=True, text=True, check=False)
    gpus = listed.stdout.split("\n")[:-1] if listed.returncode == 0 else []
    return ", ".join([*(f"{gpus.count(name)} x {name}" for name in sorted(set(gpus))), cores])
