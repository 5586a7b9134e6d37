"""Work ahead of the training loop, in a thread of its own."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.1
"""A thread that waits for room looks this often whether it shall end."""
CLOSE_SECONDS = 10.0
"""The end waits this long for the item that the thread is making; the thread ends with the process at the latest."""


class _End:
    """The last thing in the queue: the iterator ended, or failed with ``error``."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Runs an iterator in a background thread, at most ``depth`` items ahead; a context manager that ends the thread.

    Items come in order. An error of the iterator is raised in place of the item that it could not make, after the items before
    it, so that a run that fails has trained the same steps however far ahead the thread was. The iterator must not use
    collectives: other threads of the process issue them too, and ranks would not agree on their order.
    """

    def __init__(self, make: Callable[[], Iterator[T]], depth: int, *, start: Callable[[], None] | None = None) -> None:
        """Describe the work; the thread starts with ``with``.

        Args:
            make: makes the iterator, in the thread.
            depth: items that wait at most; the thread holds one more.
            start: called first in the thread, to choose its CUDA device for example.

        Raises:
            ValueError: if ``depth`` is not positive.
        """
        if depth < 1:
            raise ValueError(f"depth must be positive, got {depth}")
        self.seconds_waited = 0.0
        """Time that ``next`` waited for items, in all."""
        self._make, self._start = make, start
        self._queue: queue.Queue[T | _End] = queue.Queue(depth)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)

    def __enter__(self) -> "Prefetcher[T]":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._is_closed.set()
        self._thread.join(CLOSE_SECONDS)

    def __iter__(self) -> "Prefetcher[T]":
        return self

    def __next__(self) -> T:
        if self._is_closed.is_set():
            raise StopIteration
        started = time.monotonic()
        item = self._queue.get()
        self.seconds_waited += time.monotonic() - started
        if not isinstance(item, _End):
            return item
        self._is_closed.set()
        if item.error is not None:
            raise item.error
        raise StopIteration

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            if self._start is not None:
                self._start()
            for item in self._make():
                if not self._put(item):
                    return
        # whatever it is, the loop must hear of it: it waits for this thread alone
        except BaseException as caught:
            error = caught
        self._put(_End(error))

    def _put(self, item: T | _End) -> bool:
        """Whether the item found room before the end."""
        while not self._is_closed.is_set():
            try:
                self._queue.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue
            return True
        return False
