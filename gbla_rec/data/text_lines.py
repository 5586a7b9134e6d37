"""Lines of a plain or gzipped text file, one at a time, with the number that an error names."""

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[tuple[int, str]]:
    """Number (from 1) and text of each line that is not blank, without its line end.

    Raises:
        ValueError: if the file is no whole gzip file, or a line is not of ``encoding``; the message names file and line.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                text = line.decode(encoding).rstrip("\r\n")
                if text.strip():
                    yield number, text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}, line {number}: not {encoding} text ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: not a whole gzip file after line {number}; is it truncated? ({error})") from error


def _open(path: Path) -> IO[bytes]:
    # GzipFile is a reader of bytes, though its type does not say so
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]
