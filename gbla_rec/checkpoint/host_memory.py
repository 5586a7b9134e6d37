"""The memory of this machine as far as this process may use it: what the kernel says, or a control group allows."""

from collections.abc import Iterator
from pathlib import Path

RECLAIMABLE = ("inactive_file", "active_file", "slab_reclaimable")
"""Of a control group's memory.stat: what counts as used and can be had back."""


def available_host_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process can still use: what the kernel calls available, or less where a control group limits it.

    Args:
        root: of the file system that has ``proc`` and ``sys``.
    """
    groups = [limit - used for limit, used in _limits(root)]
    return max(min([_meminfo(root, "MemAvailable"), *groups]), 0)


def total_host_bytes(root: Path = Path("/")) -> int:
    """Bytes of this machine's memory, used or not, or less where a control group limits this process.

    Args:
        root: of the file system that has ``proc`` and ``sys``.
    """
    return min([_meminfo(root, "MemTotal"), *(limit for limit, _ in _limits(root))])


def _meminfo(root: Path, name: str) -> int:
    """An entry of the kernel's ``meminfo``, bytes."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no {name}: the memory of this machine is unknown")


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of the control groups that limit this process, bytes."""
    for group in _control_groups(root):
        if (found := _limit_and_use(*group)) is not None:
            yield found


def _control_groups(root: Path) -> Iterator[tuple[Path, str, str]]:
    """Directory, limit file and usage file of the groups that may limit this process, version 1 and 2."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        is_first_version = "memory" in controllers.split(",")
        if not is_first_version and controllers:
            continue
        base = root / "sys/fs/cgroup" / ("memory" if is_first_version else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if is_first_version else ("memory.max", "memory.current")
        group = base / path.strip().lstrip("/")
        # inside a container the path may name a directory of the host, which is not there
        for directory in dict.fromkeys([group, *(parent for parent in group.parents if parent.is_relative_to(base)), base]):
            yield directory, *names


def _limit_and_use(directory: Path, limit_name: str, usage_name: str) -> tuple[int, int] | None:
    limit, usage = _lines(directory / limit_name), _lines(directory / usage_name)
    if not limit or not usage or not limit[0].strip().isdecimal():
        return None
    # the kernel counts the page cache as used, and gives it up when needed; "total_" in version 1: with the groups below
    stat = dict(line.split()[:2] for line in _lines(directory / "memory.stat") if line.count(" "))
    cache = [sum(int(stat.get(prefix + kind, 0)) for kind in RECLAIMABLE) for prefix in ("", "total_")]
    return int(limit[0]), int(usage[0]) - max(cache)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
