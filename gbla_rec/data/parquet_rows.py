"""A Parquet file from rows that are made one by one, in bounded memory."""

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 50_000


def write_parquet_rows(path: Path, schema: pa.Schema, rows: Iterable[Sequence[Any]]) -> None:
    """Write ``rows`` in their order; each has the values of ``schema``'s columns in order. Held in memory: one row group."""
    remaining = iter(rows)
    with pq.ParquetWriter(path, schema) as writer:
        while group := list(islice(remaining, ROWS_PER_GROUP)):
            columns = zip(*group, strict=True)
            writer.write_table(pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema))
