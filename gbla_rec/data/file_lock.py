"""A file that one process at a time has locked; the system frees it when that process ends, however it ends."""

import errno
import fcntl
import logging
import os
import weakref
from typing import IO

logger = logging.getLogger(__name__)
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)
"""What ``flock`` says on a file system that has none: NFS without its lock service, Lustre mounted without ``flock``, some of FUSE."""
_warned_of: set[int] = set()
_locked: weakref.WeakSet[IO[str]] = weakref.WeakSet()


def take_lock(file: IO[str]) -> bool:
    """Lock an open file, without waiting, until it is closed or the process has ended.

    A forked child, such as a data worker, gives its copy of the file up: else it would keep the lock of a parent that was killed.
    A program that is to share the lock needs ``pass_fds``. On a file system without locks it warns, once, and goes on without one.

    Args:
        file: open for writing, which some file systems ask for.

    Returns:
        Whether no other process has it.

    Raises:
        OSError: if the system fails in another way.
    """
    # before it is locked: another thread may fork at any time
    _locked.add(file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
        device = os.fstat(file.fileno()).st_dev
        if device not in _warned_of:
            _warned_of.add(device)
            logger.warning("%s cannot be locked (%s): see to it that no second process writes there", file.name, error.strerror)
    return True


def _give_up_in_child() -> None:
    held = [file.fileno() for file in _locked if not file.closed]
    if not held:
        return
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in held:
        # in its place, not just closed: the child may still close the file, and with it whatever had its number by then
        os.dup2(nowhere, descriptor, inheritable=False)
    os.close(nowhere)


os.register_at_fork(after_in_child=_give_up_in_child)
