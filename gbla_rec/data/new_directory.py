"""A directory that appears whole or not at all."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gbla_rec.data.file_lock import take_lock

LOCK_NAME = ".lock"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_directory(output: Path) -> Iterator[Path]:
    """Yield a temporary sibling of ``output`` that is renamed to it at the end, or deleted on any exception.

    The temporary directory ``.tmp-<name>-*`` holds a locked file while its process lives; those of processes that
    were killed are deleted by the next run for the same ``output``.

    Raises:
        FileExistsError: if ``output`` exists, before or after the work.
        OSError: if it cannot be made; one for want of room names ``output`` where it named no file.
    """
    _refuse_existing(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".tmp-{output.name}-"
    for leftover in output.parent.glob(f"{prefix}*"):
        _remove_if_abandoned(leftover)
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
    try:
        with (directory / LOCK_NAME).open("w") as lock:
            take_lock(lock)
            yield directory
            _flush(directory)
            (directory / LOCK_NAME).unlink()
            _refuse_existing(output)
            # mkdtemp makes the directory private; the dataset follows the user's umask
            directory.chmod(0o777 & ~_umask())
            directory.rename(output)
    except BaseException as error:
        shutil.rmtree(directory, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename is None:
            # a failed write does not say where
            raise OSError(error.errno, error.strerror, str(output)) from error
        raise


def _refuse_existing(output: Path) -> None:
    if output.exists() or output.is_symlink():
        raise FileExistsError(f"{output} exists; delete it or choose another name")


def _remove_if_abandoned(directory: Path) -> None:
    try:
        with (directory / LOCK_NAME).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(directory, ignore_errors=True)
    except OSError:
        # alive, just being made, or not ours to delete
        return


def _flush(directory: Path) -> None:
    """Force every file to disk, so that a power cut after the rename cannot leave an empty one."""
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
