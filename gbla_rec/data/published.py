"""A public dataset in one of the forms in which it is published: how it is prepared, and what must be converted first."""

import re
from collections.abc import Callable, Sequence
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


def files_like(path: Path, patterns: Sequence[str]) -> list[Path]:
    """The file ``path`` if its name fits one of the glob ``patterns``, or the files right in the directory ``path`` that do, sorted."""
    names = [path] if path.is_file() else path.iterdir()
    return sorted(file for file in names if file.is_file() and any(file.match(pattern) for pattern in patterns))


def require_path(path: Path) -> None:
    """Refuse a path where nothing lies.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"--path: {path} does not exist")
