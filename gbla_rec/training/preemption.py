"""A polite end: SIGTERM, as a scheduler sends it before it takes the machine, stops all ranks at one step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")
EXIT_STATUS = 128 + signal.SIGTERM
"""What a shell reports of a process that SIGTERM ended: neither success, nor an error of the run."""
REPEAT_SECONDS = 10.0
"""So long after a SIGTERM another is the same request: a scheduler that signals every process, and a launcher that passes it on."""
BATCHES_PER_CHECK = 8
"""Ranks agree this often: hosts exchange one number over gloo, and no GPU waits."""


class StopRequest:
    """Whether SIGTERM came to any rank since ``with``; one that comes ``REPEAT_SECONDS`` later or more ends the process.

    An error that leaves ``with`` on one rank among others ends that process soon (``process_group``). The launcher sends
    SIGTERM at that very time, because another rank failed: it stays noted only, or the error would never be shown.

    Outside the main thread, which alone may handle signals, it never stops.
    """

    def __init__(self) -> None:
        """All ranks make it together."""
        self._asked_at: float | None = None
        self._num_calls = 0
        self._group = dist.new_group(backend="gloo") if dist.get_backend() != "gloo" else None

    def __enter__(self) -> "StopRequest":
        self._is_main = threading.current_thread() is threading.main_thread()
        if self._is_main:
            self._previous = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        is_ending = isinstance(error, Exception) and dist.get_world_size() > 1
        if self._is_main and not is_ending:
            signal.signal(signal.SIGTERM, self._previous)

    def stop(self, items: Iterator[T]) -> Iterator[T]:
        """The same items up to the request; all ranks ask for equally many."""
        for item in items:
            if self.is_due():
                return
            yield item

    def is_due(self) -> bool:
        """Whether all ranks stop now; all ranks call it equally often, before each batch."""
        self._num_calls += 1
        if self._num_calls % BATCHES_PER_CHECK:
            return False
        asked = torch.tensor(int(self._asked_at is not None))
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        return bool(asked)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._asked_at is None:
            self._asked_at = now
        elif now - self._asked_at >= REPEAT_SECONDS:
            # by the signal itself: the parent sees what ended it
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
