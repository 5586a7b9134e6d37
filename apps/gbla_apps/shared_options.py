"""Options that are wrong on every rank are said to be so by the first one alone. Imports no library, so that every command starts."""

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from gbla_apps.endings import end

FIRST_RANK_SECONDS = 15.0
"""A launcher ends all ranks when one has failed: the first, which may start more slowly, must have spoken before."""


@contextmanager
def shared_options() -> Iterator[None]:
    """Around what judges options alone, which the launcher gives to all ranks: all but the first do it in silence.

    They end with the same status, some seconds after the first. What one rank alone may find, such as a missing file, does not belong here.
    """
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    except (ValueError, SystemExit) as error:
        status = error.code if isinstance(error, SystemExit) else 2
        if not status:
            # help
            raise
        time.sleep(FIRST_RANK_SECONDS)
        end(2 if isinstance(status, str) else status, error)
