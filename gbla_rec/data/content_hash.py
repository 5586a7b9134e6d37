"""A hash of what a dataset says, whatever files, shards and encodings it is stored in.

Every column has a SHA-256 stream of its own, fed in the order of users (or items, or codes); the hash of the dataset
covers the names and digests of all streams. Strings enter as UTF-8 byte lengths (-1 for a missing one) and bytes.
"""

import hashlib
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray


class ContentHash:
    """Collects columns piece by piece; the pieces' boundaries do not matter."""

    def __init__(self) -> None:
        """Start with no column."""
        self._streams: dict[str, Any] = {}

    def add_numbers(self, column: str, values: NDArray[Any]) -> None:
        """Append numbers to a column; they enter as little-endian int64, or float64 if they are floats."""
        width = "<f8" if values.dtype.kind == "f" else "<i8"
        self._stream(column).update(np.ascontiguousarray(values, dtype=width).data)

    def add_series(self, column: str, values: pl.Series) -> None:
        """Append the values of a string, integer, float or bool column that may miss values."""
        if values.dtype == pl.String:
            self.add_numbers(f"{column}/bytes", values.str.len_bytes().cast(pl.Int64).fill_null(-1).to_numpy())
            self._stream(f"{column}/text").update("".join(values.drop_nulls().to_list()).encode())
            return
        dtype = pl.Float64 if values.dtype.is_float() else pl.Int64
        self.add_numbers(f"{column}/missing", values.is_null().cast(pl.Int64).to_numpy())
        self.add_numbers(f"{column}/{dtype.__name__}", values.cast(dtype).fill_null(0).to_numpy())

    def hexdigest(self) -> str:
        """The hash of all columns so far."""
        whole = hashlib.sha256()
        for column, stream in sorted(self._streams.items()):
            whole.update(f"{len(column.encode())}:{column}:{stream.hexdigest()}\n".encode())
        return whole.hexdigest()

    def _stream(self, column: str) -> Any:
        return self._streams.setdefault(column, hashlib.sha256())
