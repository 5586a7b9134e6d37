"""``ratings.dat`` and ``movies.dat`` of ml-1m and ml-10m: fields separated by ``::``, without a header, as CSV."""

import csv
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

from gbla_rec.config import PrepareConfig
from gbla_rec.data.text_lines import read_lines

RATING_FIELDS = ("userId", "movieId", "rating", "timestamp")
FILM_FIELDS = ("movieId", "title", "genres")


def convert_dat(config: PrepareConfig, directory: Path) -> PrepareConfig:
    """Write the ratings and the films as CSV into ``directory``; the fields keep their text.

    Raises:
        ValueError: if a line has other fields; the message names the file and the line.
    """
    _write_csv(directory / "ratings.csv", RATING_FIELDS, _rows(config.events, "utf-8", RATING_FIELDS, _split_rating))
    config = dataclasses.replace(config, events=directory / "ratings.csv")
    if config.items is None or config.items.suffix != ".dat":
        return config
    _write_csv(directory / "movies.csv", FILM_FIELDS, _rows(config.items, _encoding(config.items), FILM_FIELDS, _split_film))
    return dataclasses.replace(config, items=directory / "movies.csv")


def _write_csv(path: Path, header: tuple[str, ...], rows: Iterator[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _rows(path: Path, encoding: str, fields: tuple[str, ...], split: Callable[[str], list[str]]) -> Iterator[list[str]]:
    for number, line in read_lines(path, encoding):
        row = split(line)
        if len(row) != len(fields) or not all(row):
            raise ValueError(f"{path}, line {number}: must be {'::'.join(fields)}, got {line!r}")
        yield row


def _split_rating(line: str) -> list[str]:
    return line.split("::")


def _split_film(line: str) -> list[str]:
    """The id is up to the first ``::``, the genres are after the last one, so that a title may hold one."""
    film, _, rest = line.partition("::")
    title, _, genres = rest.rpartition("::")
    return [film, title, genres]


def _encoding(path: Path) -> str:
    """ml-10m is UTF-8 (its README says so), ml-1m is Latin-1, whose accents are no UTF-8."""
    try:
        for _ in read_lines(path, "utf-8"):
            pass
    except ValueError:
        return "latin-1"
    return "utf-8"
