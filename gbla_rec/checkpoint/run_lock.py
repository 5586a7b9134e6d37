"""One training at a time writes a run directory: its first rank holds the lock of a file there for as long as it trains.

Evaluation reads without it. The other ranks need none of their own: they write only what the first one asks for.
"""

import json
import logging
import os
import socket
import time
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.data.file_lock import take_lock

logger = logging.getLogger(__name__)
LOCK = "lock"
"""The file; it stays when the lock is free, since to delete it would let two processes lock two files of one name."""
WAIT_SECONDS = 10.0
"""For a process of this machine that is just ending: its lock is free once it is gone."""
LEASE_SECONDS = 120.0
"""For one of another machine: if that machine is lost, a shared file system keeps its locks for a while (NFS 4: 90 s)."""
POLL_SECONDS = 0.1


class RunLock:
    """``with RunLock(run_dir)`` holds the directory; all ranks enter together, and the first one locks.

    A lock ends with its process, so a killed training leaves none behind, and a training that outlives its launcher keeps it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: IO[str] | None = None

    def __enter__(self) -> "RunLock":
        """Lock, or wait for a process that is just ending.

        Raises:
            BlockingIOError: on all ranks, if another process keeps the lock; names it, its host and the cure.
            OSError: on all ranks, if the file cannot be written, for want of rights or room; names it.
        """
        on_first_rank(self._take)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()

    def keep_until(self, save: Future[None]) -> None:
        """Stay locked beyond ``with`` until a save that is left behind has ended."""
        file, self._file = self._file, None
        if file is not None:
            save.add_done_callback(lambda _: file.close())

    def _take(self) -> None:
        # not "w": until it is locked, the file says who has it
        file = (self._run_dir / LOCK).open("a+")
        try:
            self._wait_for(file)
            _sign(file)
        except BaseException:
            # on a full disk closing fails too, and would hide the error
            with suppress(OSError):
                file.close()
            raise
        self._file = file

    def _wait_for(self, file: IO[str]) -> None:
        started, is_told = time.monotonic(), False
        while not take_lock(file):
            holder = self._holder()
            limit = WAIT_SECONDS if holder.get("machine") == _machine() else LEASE_SECONDS
            if time.monotonic() - started >= limit:
                raise BlockingIOError(
                    f"{self._run_dir} is written by another training, {_described(holder)}; end that one first (kill asks it to save; its "
                    "ranks outlive a torchrun that is killed), or leave --resume out, which starts a new run"
                )
            if not is_told:
                is_told = True
                logger.warning("%s is locked by %s: waiting up to %.0f s for its end", self._run_dir, _described(holder), limit)
            time.sleep(POLL_SECONDS)

    def _holder(self) -> dict[str, str]:
        """What the file says of the process that locked it; nothing while that one is about to write."""
        try:
            found = json.loads((self._run_dir / LOCK).read_text())
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def _sign(file: IO[str]) -> None:
    try:
        file.truncate(0)
        file.write(json.dumps(_this_process()) + "\n")
        file.flush()
    except OSError as error:
        # a failed write does not say where
        raise OSError(error.errno, error.strerror, file.name) from error


def _described(holder: dict[str, str]) -> str:
    if "pid" not in holder:
        return f"a process that {LOCK} in it does not name"
    return f"process {holder['pid']} on host {holder.get('host')} (since {holder.get('since')})"


def _this_process() -> dict[str, str]:
    since = datetime.now(UTC).isoformat(timespec="seconds")
    return {"pid": str(os.getpid()), "host": socket.gethostname(), "machine": _machine(), "since": since}


def _machine() -> str:
    """This machine since it was started: a node that took the name of a lost one is another."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()
