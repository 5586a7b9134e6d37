"""Refuses a torch that the installed torchrec and fbgemm-gpu were not built for, before their libraries fail to load."""

import importlib.metadata
import re
from functools import cache

FBGEMM_NAMES = ("fbgemm-gpu", "fbgemm-gpu-cpu")
"""Distributions that bring ``import fbgemm_gpu``; both may be there, one of them without code."""
MINOR_OFFSET = 5
"""torch 2.(X + 5) belongs to torchrec 1.X and fbgemm-gpu 1.X."""


@cache
def check_versions() -> None:
    """Check that torch, torchrec and fbgemm-gpu were released for each other; call it before ``import torchrec``.

    Local version suffixes (``+cpu``, ``+cu130``) and patch numbers do not matter.

    Raises:
        ImportError: if one of them is missing or does not belong to the installed torch; the message names both versions and the cure.
    """
    torch = _installed("torch")
    if torch is None:
        raise ImportError("torch is not installed; run: make install")
    wanted = (1, _minor("torch", torch, major=2) - MINOR_OFFSET)
    found = {name: version for name in ("torchrec", *FBGEMM_NAMES) if (version := _installed(name)) is not None}
    for names in (("torchrec",), FBGEMM_NAMES):
        if not any(name in found for name in names):
            raise ImportError(
                f"{' or '.join(names)} is not installed; torch {torch} needs version {_dotted(wanted)}: {_cure(names[0], wanted)}"
            )
    for name, version in found.items():
        if _release(name, version) != wanted:
            raise ImportError(
                f"{name} {version} was not built for torch {torch}, which needs {name} {_dotted(wanted)}: {_cure(name, wanted)}"
            )


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _release(name: str, version: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise ImportError(f"{name} has the version {version!r}, expected MAJOR.MINOR...; install a released version")
    return int(match[1]), int(match[2])


def _minor(name: str, version: str, *, major: int) -> int:
    release = _release(name, version)
    if release[0] != major:
        raise ImportError(f"{name} must have major version {major}, got {version}; run: make install")
    return release[1]


def _dotted(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))


def _cure(name: str, wanted: tuple[int, int]) -> str:
    return f"run `make install` for the tested versions, or `pip install '{name}=={_dotted(wanted)}.*'`"
