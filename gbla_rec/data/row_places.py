"""Where a reader of an error finds a row: by its line in a CSV file, by its number in a Parquet file."""

from pathlib import Path

import polars as pl

from gbla_rec.data.input_files import CSV_SUFFIXES

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def place_of_row(path: Path, row: int) -> str:
    """``"line 4"``, counted from 1 as editors do, or ``"row 2 (from 0)"`` of a Parquet file.

    Args:
        path: a file in which the row can be read.
        row: from 0, a header not counted, as ``input_files.ROW`` has it.
    """
    if path.suffix.lower() not in CSV_SUFFIXES:
        return f"row {row} (from 0)"
    return f"line {_line_of_row(path, row)}"


def _line_of_row(path: Path, row: int) -> int:
    """The line on which the row begins: quoted fields before it may span several."""
    # truncated: a stray quote may make a row too long in columns that a log does not read, and is no reason to fail here
    frame = pl.scan_csv(path, infer_schema=False, glob=False, truncate_ragged_lines=True)
    columns = frame.collect_schema().names()
    line_ends = pl.sum_horizontal(pl.col(name).str.count_matches("\n", literal=True).cast(pl.Int64) for name in columns)
    in_rows: int = frame.head(row).select(line_ends.sum()).collect(engine="streaming").item()
    in_header = sum(name.count("\n") for name in columns)
    return 1 + _blank_lines_before_header(path) + 1 + in_header + row + in_rows


def _blank_lines_before_header(path: Path) -> int:
    """The reader skips these; every later blank line is a row of nulls."""
    with path.open("rb") as file:
        number = 0
        for line in file:
            if line.removeprefix(BYTE_ORDER_MARK if number == 0 else b"").rstrip(b"\r\n"):
                break
            number += 1
    return number
