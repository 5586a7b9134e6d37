"""Find and scan the files of a log, and say which file and line is to blame when one cannot be read.

``ROW`` counts from 0 and a CSV header does not count; ``row_places`` turns it into what an error says. CSV columns are read as
text, so that no value is lost to a guessed type; ``column_kinds`` decides what the text means.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import polars as pl
from polars.exceptions import PanicException, PolarsError

from gbla_rec.data.csv_widths import count_in_header, first_unequal_row, why_unequal_widths

PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv",)
ROW = "__row"


OTHER_SEPARATORS = ";\t|"
"""Read as commas are, a CSV with one of these has a single column."""


@dataclass(frozen=True, slots=True)
class InputFile:
    """One Parquet or CSV file: ``frame`` has the file's columns and ``ROW``."""

    path: Path
    is_csv: bool
    frame: pl.LazyFrame
    schema: dict[str, pl.DataType]

    def require_columns(self, columns: Sequence[str], what: str, *, cure: str) -> None:
        """Refuse the file if it lacks one of ``columns``, or its header has one twice.

        Args:
            columns: that it must have.
            what: what they are, for the message.
            cure: what helps a file that is separated as it should be.

        Raises:
            ValueError: naming the file and the column, and if that is missing the columns it has.
        """
        for column in columns:
            if column not in self.schema:
                only = next(iter(self.schema)) if len(self.schema) == 1 else ""
                if self.is_csv and set(only) & set(OTHER_SEPARATORS):
                    cure = "a CSV must be separated by commas"
                raise ValueError(f"{self.path}: {what} column {column!r} is missing; the file has {sorted(self.schema)}; {cure}")
            # what the reader calls the second column of a name; a file may have such a name of its own
            if self.is_csv and f"{column}_duplicated_0" in self.schema and count_in_header(self.path, column) > 1:
                raise ValueError(f"{self.path}: {what} column {column!r} is twice in the header; rename or remove one of them")

    def require_equal_widths(self) -> None:
        """Refuse a CSV file in which a row has more or fewer fields than the header, also in columns that are not read.

        Raises:
            ValueError: naming the file and the line of the first such row.
        """
        reason = why_unequal_widths(self.path, len(self.schema)) if self.is_csv else None
        if reason is not None:
            raise ValueError(f"{self.path}: {reason}")


def find_files(path: Path, argument: str) -> list[Path]:
    """The file ``path``, or all Parquet and CSV files below the directory ``path``, sorted by path.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if there is no Parquet or CSV file.
    """
    if not path.exists():
        raise FileNotFoundError(f"{argument} must be a file or a directory, {path.absolute()} does not exist")
    suffixes = PARQUET_SUFFIXES + CSV_SUFFIXES
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise ValueError(f"{argument}: {path} must end in one of {suffixes}")
        return [path]
    found = (file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    files = sorted(file for file in found if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts))
    if not files:
        raise ValueError(f"{argument}: the directory {path} holds no file ending in one of {suffixes}")
    return files


def open_file(path: Path) -> InputFile:
    """Scan one file lazily; only its schema is read.

    Raises:
        ValueError: if the file is empty, truncated or not of the format its name says.
    """
    is_csv = path.suffix.lower() in CSV_SUFFIXES
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    with blame([path]):
        if is_csv:
            frame = pl.scan_csv(path, infer_schema=False, row_index_name=ROW, glob=False)
        else:
            frame = pl.scan_parquet(path, row_index_name=ROW, glob=False, hive_partitioning=False)
        schema = dict(frame.collect_schema())
    del schema[ROW]
    return InputFile(path, is_csv, frame.with_columns(pl.col(ROW).cast(pl.Int64)), schema)


@contextmanager
def blame(paths: Sequence[Path]) -> Iterator[None]:
    """Turn a reader's error into one ``ValueError`` that names the unreadable file (and the line, for CSV)."""
    try:
        yield
    except (PolarsError, PanicException) as error:
        for path in paths:
            reason = _why_unreadable(path)
            if reason is not None:
                raise ValueError(f"{path}: {reason}") from error
        raise ValueError(f"cannot read {', '.join(map(str, paths[:3]))}: {_first_line(error)}") from error


def _why_unreadable(path: Path) -> str | None:
    if path.suffix.lower() in CSV_SUFFIXES:
        return _why_bad_csv(path)
    try:
        pl.scan_parquet(path, glob=False, hive_partitioning=False).select(pl.all().null_count()).collect(engine="streaming")
    except (PolarsError, PanicException) as error:
        return f"not a whole Parquet file; is it truncated? ({_first_line(error)})"
    return None


def _why_bad_csv(path: Path) -> str | None:
    try:
        reason = first_unequal_row(path, errors="strict")
    except UnicodeDecodeError as error:
        return f"line {_undecodable_line(path)} is not UTF-8 text ({error.reason}); save the file as UTF-8"
    if reason is not None:
        return reason
    try:
        pl.scan_csv(path, infer_schema=False, glob=False).select(pl.all().null_count()).collect(engine="streaming")
    except (PolarsError, PanicException) as error:
        return f"not a readable CSV file ({_first_line(error)})"
    return None


def _undecodable_line(path: Path) -> int:
    """Counted from 1; the reader's error has a place in its own buffer only. A line's end is no part of a longer character."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    raise AssertionError(f"{path} is UTF-8 text")


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
