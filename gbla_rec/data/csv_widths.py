"""Rows of a CSV file with more or fewer fields than its header.

A reader that parses only some columns does not see them, and it reads the fields that a row lacks as missing values: the last line of a
file that was cut off becomes an event. So the separators of the whole file are counted, as bytes and without parsing a value.
"""

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import numpy as np

BLOCK_BYTES = 1 << 18
"""Small enough that a block and its masks stay in the cache of a core."""
SEPARATOR, LINE_END, QUOTE = ord(","), ord("\n"), ord('"')
CUT_OFF = "a file cut off while it was written ends so"


def why_unequal_widths(path: Path, num_fields: int) -> str | None:
    """What to say of the first row that has more or fewer fields than the header; ``None`` if there is none.

    Wholly blank lines are no rows with too few fields: the reader makes them rows of missing values.

    Args:
        path: a CSV file in UTF-8, separated by commas.
        num_fields: of the header.
    """
    # what is no UTF-8 in columns that are not read is no reason to fail here
    return None if _has_equal_widths(path, num_fields) else first_unequal_row(path, errors="replace")


def first_unequal_row(path: Path, errors: str) -> str | None:
    """As ``why_unequal_widths``, exact in all cases, but at the speed of the csv module.

    Args:
        path: a CSV file, separated by commas.
        errors: what to do with what is no UTF-8, as ``open`` takes it.

    Raises:
        UnicodeDecodeError: if the text is no UTF-8 and ``errors`` is ``"strict"``.
    """
    limit = csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", errors=errors, newline="\n") as file:
            return _unequal_row(file)
    except csv.Error as error:
        return f"not a CSV file ({error})"
    finally:
        csv.field_size_limit(limit)


def count_in_header(path: Path, column: str) -> int:
    """How often the header of a CSV file in UTF-8, separated by commas, has ``column``."""
    with path.open(encoding="utf-8-sig", errors="replace", newline="\n") as file:
        # the reader of the values skips blank lines before the header
        return next(filter(None, csv.reader(file)), []).count(column)


def _unequal_row(file: TextIO) -> str | None:
    # to the reader of the values a carriage return alone is text; the csv module would end the row
    own_lines: list[str] = []

    def read_lines() -> Iterator[str]:
        for line in file:
            own_lines.append(line.replace("\r\n", "\n").replace("\r", " "))
            yield own_lines[-1]

    rows = csv.reader(read_lines())
    # the reader skips blank lines before the header
    header = next(filter(None, rows), None)
    if header is None:
        return "the file is empty"
    line = rows.line_num + 1
    own_lines.clear()
    for row in rows:
        if row and len(row) != len(header):
            fields = "1 field" if len(row) == 1 else f"{len(row)} fields"
            return f"line {line} has {fields}, the header has {len(header)}; {_cure(is_short=len(row) < len(header))}"
        # a quoted field may span lines: the next row begins where this one ends
        if (len(own_lines) > 1 or own_lines[0].count('"') % 2) and _ends_inside_quotes(own_lines):
            return f"line {line} begins a quoted field that does not end; mend it; {CUT_OFF}"
        own_lines.clear()
        line = rows.line_num + 1
    return None


def _ends_inside_quotes(lines: list[str]) -> bool:
    """Whether the row of ``lines`` is the last of a file that ends before its quoted field does: no other row can."""
    try:
        list(csv.reader(lines, strict=True))
    except csv.Error as error:
        return "unexpected end of data" in str(error)
    return False


def _cure(*, is_short: bool) -> str:
    if is_short:
        return f"quote fields that hold a line break, or mend the line; {CUT_OFF}"
    return "quote fields that hold a comma, or mend the line"


def _has_equal_widths(path: Path, num_fields: int) -> bool:
    """Whether every ``num_fields``-th separator or line end outside quotes is a line end, and no other.

    It may be false of a good file too, with blank lines or with quotes inside of unquoted fields.
    """
    place, is_quoted, block = 0, False, b""
    with path.open("rb") as file:
        while more := file.read(BLOCK_BYTES):
            block = more
            data = np.frombuffer(block, np.uint8)
            is_end = data == LINE_END
            is_mark = is_end | (data == SEPARATOR)
            if is_quoted or b'"' in block:
                inside = np.logical_xor.accumulate(data == QUOTE) ^ is_quoted
                is_mark &= ~inside
                is_quoted = bool(inside[-1])
            ends = is_end[is_mark]
            due = ends[num_fields - 1 - place :: num_fields]
            if not due.all() or np.count_nonzero(ends) != len(due):
                return False
            place = (place + len(ends)) % num_fields
    # the last line may lack its line end
    return not is_quoted and (place == 0 if block.endswith(b"\n") else place == num_fields - 1)
