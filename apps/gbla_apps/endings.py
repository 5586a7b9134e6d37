"""How the process of a command ends. Imports no library, so that every command starts."""

import os
import select
import signal
import sys
import traceback
from typing import NoReturn


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads: other pipes and sockets break too, and those are errors."""
    waiting = select.poll()
    try:
        waiting.register(sys.stdout, 0)
    except ValueError:
        # not a file of the operating system
        return False
    return any(event & select.POLLERR for _, event in waiting.poll(0))


def end_for_want_of_a_reader(error: BrokenPipeError) -> NoReturn:
    """Silently, with the status of SIGPIPE."""
    # what is still to be written would fail again at the interpreter's end, and be shown
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    end(128 + signal.SIGPIPE, error)


def end_with_traceback(error: Exception) -> NoReturn:
    """Raise ``error``, or, on a rank among others, show it and end at once."""
    if not _is_rank():
        raise error
    traceback.print_exception(error)
    end(1, error)


def end(status: int, error: BaseException) -> NoReturn:
    """End the program; a rank among others at once: the interpreter's own end could wait for threads and for the other ranks."""
    if _is_rank():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    raise SystemExit(status) from error


def is_first_rank() -> bool:
    """Whether this process is rank 0, or alone: ``RANK`` without ``WORLD_SIZE`` makes no group (``process_group``)."""
    return not _is_rank() or os.environ.get("RANK", "0") == "0"


def _is_rank() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
