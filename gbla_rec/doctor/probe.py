"""Trying a library in a process of its own: a broken one may raise, hang, or end the interpreter."""

import json
import signal
import subprocess
import sys
from typing import Any

TIMEOUT_S = 180.0
"""Importing torch from a cold network file system takes a minute or more."""


class ProbeError(Exception):
    """A library failed; the message is one line."""


def probe(name: str, *arguments: str, timeout_s: float = TIMEOUT_S) -> dict[str, Any]:
    """What the function ``name`` of ``probe_process`` returned.

    Raises:
        ProbeError: if it raised, ended its process, or took longer than ``timeout_s``.
    """
    return outcome(start(name, *arguments), timeout_s)


def start(name: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a probe; ``outcome`` waits for it."""
    command = [sys.executable, "-m", "gbla_rec.doctor.probe_process", name, *arguments]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace")


def outcome(process: subprocess.Popen[str], timeout_s: float) -> dict[str, Any]:
    """What a started probe returned; raises as ``probe`` does."""
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise ProbeError(f"no answer within {timeout_s:g} s") from None
    finally:
        process.kill()
        process.wait()
    if process.returncode:
        raise ProbeError(_last_words(process.returncode, errors))
    try:
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        raise ProbeError("ended without an answer") from None
    if "raised" in result:
        raise ProbeError(result["raised"])
    return result


def _last_words(status: int, errors: str) -> str:
    ended = f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    return f"{ended}: {lines[-1]}" if lines else ended
