"""The workspace, shared memory and the limit of open files."""

import errno
import os
import resource
import shutil
import tempfile
from pathlib import Path

from gbla_rec import workspace
from gbla_rec.doctor.finding import Finding, ok, problem, warning

GIB = 2**30
MIN_FREE_BYTES = 10 * GIB
"""A checkpoint of large tables and its predecessor; small runs need less."""
MIN_SHARED_MEMORY_BYTES = GIB
MIN_OPEN_FILES = 1024
TRIAL_BYTES = 2**20
CURES = {
    errno.ENOSPC: "free space there",
    errno.EDQUOT: "your quota is used up: free space there",
    errno.EFBIG: "the shell limits the size of files: ulimit -f unlimited",
    errno.EROFS: "it is mounted read-only: mount it for writing",
    errno.EACCES: "give this user the right to write there",
    errno.EPERM: "give this user the right to write there",
    errno.ENOTDIR: "a part of the path is a file: remove it",
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def workspace_writable() -> Finding:
    """Whether files can be written, synced and renamed where runs are saved."""
    root = workspace.root()
    try:
        place = try_directory(root)
    except OSError as error:
        return problem("workspace", f"{root.absolute()} cannot be written: {error.strerror}", write_cure(error, workspace.VARIABLE))
    return ok("workspace", f"{root.absolute()} {'is writable' if place == root else 'can be made and written'}")


def free_space() -> Finding:
    """Free bytes on the workspace's disk."""
    root = workspace.root()
    try:
        free = shutil.disk_usage(existing_part(root)).free
    except OSError as error:
        return problem("free space", f"{root.absolute()}: {error.strerror}", write_cure(error, workspace.VARIABLE))
    found = f"{free / GIB:.1f} GiB free at {root.absolute()}"
    if free < MIN_FREE_BYTES:
        cure = f"free space, or set {workspace.VARIABLE} to a larger disk; small runs need a few hundred MiB"
        return warning("free space", f"{found}, checkpoints of large tables need {MIN_FREE_BYTES / GIB:.0f} GiB or more", cure)
    return ok("free space", found)


def shared_memory(directory: Path = Path("/dev/shm")) -> Finding:
    """Size of /dev/shm, which containers cut to 64 MiB."""
    try:
        size = shutil.disk_usage(directory).total
    except OSError as error:
        return warning("shared memory", f"{directory}: {error.strerror}", "mount a tmpfs there; NCCL and data workers exchange data in it")
    found = f"{size / GIB:.2f} GiB at {directory}"
    if size < MIN_SHARED_MEMORY_BYTES:
        cure = "docker run --shm-size=8g; in Kubernetes an emptyDir with medium Memory, mounted there"
        return warning("shared memory", f"{found}; NCCL and data workers want {MIN_SHARED_MEMORY_BYTES / GIB:.0f} GiB or more", cure)
    return ok("shared memory", found)


def open_files() -> Finding:
    """The soft limit of open files; sockets count."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft:,}"
    if soft != resource.RLIM_INFINITY and soft < MIN_OPEN_FILES:
        found = f"{limit}; ranks hold sockets to each other and want {MIN_OPEN_FILES:,} or more"
        may_raise = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
        where = f"ulimit -n {MIN_OPEN_FILES}" if may_raise else f"raise the hard limit, {hard:,}, in limits.conf or the scheduler"
        return warning("open files", found, f"{where}; in a container --ulimit nofile={MIN_OPEN_FILES}")
    return ok("open files", limit)


def try_directory(path: Path) -> Path:
    """Write, sync and rename a file in ``path``, or in the part of it that exists; nothing is left behind.

    Returns:
        The directory that was written to.

    Raises:
        OSError: if any of it fails.
    """
    place = existing_part(path)
    with tempfile.TemporaryDirectory(dir=place, prefix=".gbla-rec-doctor-") as directory:
        before, after = Path(directory, "before"), Path(directory, "after")
        with before.open("wb") as file:
            file.write(bytes(TRIAL_BYTES))
            file.flush()
            os.fsync(file.fileno())
        before.rename(after)
        size = after.stat().st_size
        if size != TRIAL_BYTES:
            raise OSError(errno.EIO, f"{size:,} bytes of {TRIAL_BYTES:,} arrived")
    return place


def existing_part(path: Path) -> Path:
    """``path``, or its nearest parent that exists."""
    return path if path.exists() else next(parent for parent in path.absolute().parents if parent.exists())


def write_cure(error: OSError, variable: str) -> str:
    """What helps against an error of ``try_directory`` in a directory that ``variable`` names."""
    cure = CURES.get(error.errno or 0, "see that it can be written")
    return f"{cure}; or set {variable} to a directory that can be written"


def workspace_cure(error: BaseException) -> str | None:
    """What helps where ``error`` comes from a workspace that cannot be used, by itself or by a directory above it; else None."""
    if not isinstance(error, OSError):
        return None
    root = workspace.root().absolute()
    # os.path says no where Path raises for want of rights
    part = next(part for part in (root, *root.parents) if os.path.exists(part))
    if not os.path.isdir(part):
        return f"the workspace {root} cannot be made, for {part} is a file: set {workspace.VARIABLE} to a directory that can be written"
    # some calls name a file by its descriptor
    paths = [Path(name).absolute() for name in (error.filename, error.filename2) if isinstance(name, str)]
    if error.filename is None and error.errno in NO_ROOM:
        # a failed write does not say where
        return f"no file is named; if it lies in the workspace {root}: {write_cure(error, workspace.VARIABLE)}"
    is_there = any(path.is_relative_to(root) or root.is_relative_to(path) for path in paths)
    return write_cure(error, workspace.VARIABLE) if is_there and error.errno in CURES else None
