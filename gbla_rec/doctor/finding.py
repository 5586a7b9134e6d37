"""What a check reports."""

from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended."""

    OK = "ok"
    WARNING = "warning"
    """Training runs, but not as one might expect: slower, or on the CPU."""
    PROBLEM = "problem"
    """Training fails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: name of the check.
        found: what there is, and the rule where it is broken.
        cure: what to do; given if and only if the status is not OK.
    """

    check: str
    status: Status
    found: str
    cure: str | None = None

    def __post_init__(self) -> None:
        assert (self.cure is None) == (self.status is Status.OK), self


def ok(check: str, found: str) -> Finding:
    """A check that passed."""
    return Finding(check=check, status=Status.OK, found=found)


def warning(check: str, found: str, cure: str) -> Finding:
    """Something to know before a run."""
    return Finding(check=check, status=Status.WARNING, found=found, cure=cure)


def problem(check: str, found: str, cure: str) -> Finding:
    """Something that lets a run fail."""
    return Finding(check=check, status=Status.PROBLEM, found=found, cure=cure)
