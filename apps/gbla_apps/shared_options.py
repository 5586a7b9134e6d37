"""Options that are wrong on every rank are said to be so by the first one alone. Imports no library, so that every command starts."""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from gbla_apps.endings import is_first_rank

FIRST_RANK_SECONDS = 15.0
"""A launcher ends all ranks when one has failed: the first, which may start more slowly, must have spoken before."""


@contextmanager
def shared_options() -> Iterator[None]:
    """Around what judges options alone, which the launcher gives to all ranks: all but the first wait to be ended before they speak.

    A rank that is not ended speaks some seconds later: its launcher ends nobody, or it alone has met the error, as on a node with another
    version of the code. What one rank alone may find, such as a missing file, does not belong here.
    """
    if is_first_rank():
        yield
        return
    shown = io.StringIO()
    try:
        # help is for the first rank
        with redirect_stdout(io.StringIO()), redirect_stderr(shown):
            yield
    except (ValueError, SystemExit) as error:
        if isinstance(error, ValueError) or error.code:
            time.sleep(FIRST_RANK_SECONDS)
            sys.stderr.write(shown.getvalue())
        raise
