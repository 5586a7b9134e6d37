"""What was run for a job, when, and how long it took: one JSON file in the job's directory."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPTS = "attempts.json"


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
    """

    stage: str
    ended: str
    seconds: float
    share_seconds: float
    status: int
    was_stopped: bool


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
