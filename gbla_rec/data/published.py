"""A public dataset in one of the forms in which it is published: how it is prepared, and what must be converted first."""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from gbla_rec.config import PrepareConfig

Convert = Callable[[PrepareConfig, Path], PrepareConfig]
"""``convert(config, directory)`` writes what ``prepare`` cannot read as Parquet or CSV into ``directory`` and names it instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedDataset:
    """What was found at a path.

    ``config`` names the published files, and any field of it may be replaced before ``prepare(config, output, convert)``.
    """

    form: str
    """In words, for the user."""
    config: PrepareConfig
    convert: Convert | None = None


def dataset_name(family: str, title: str) -> str:
    """A name for a prepared dataset: ``amazon_beauty`` of the family ``amazon`` and the category or directory ``Beauty``.

    Characters that a name must not have become ``_``; the family is not said twice.
    """
    plain = re.sub(r"[^a-z0-9.-]+", "_", title.lower()).strip("_.-").removeprefix(family).strip("_.-")
    return f"{family}_{plain}" if plain else family


def files_like(path: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The file ``path``, or the files right in the directory ``path``, whose whole name fits ``pattern``, sorted.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"--path: {path} does not exist")
    files = path.iterdir() if path.is_dir() else (path,)
    return sorted(file for file in files if file.is_file() and pattern.fullmatch(file.name))


def the_only_file(path: Path, found: Collection[Path], wanted: Collection[str]) -> Path:
    """The file in ``found``.

    Raises:
        ValueError: if there is none (the message says what was looked for) or more than one (it lists them).
    """
    if not found:
        here = sorted(file.name for file in path.iterdir())[:10] if path.is_dir() else [path.name]
        raise ValueError(f"--path: {path} holds none of {', '.join(wanted)}, but {', '.join(here) or 'nothing'}")
    if len(found) > 1:
        names = ", ".join(file.name for file in sorted(found))
        raise ValueError(f"--path: {path} holds more than one log: {names}; give the file itself, e.g. --path {min(found)}")
    (file,) = found
    return file
