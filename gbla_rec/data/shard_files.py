"""One shard of histories: in memory as flat arrays, on disk as Parquet with small row groups.

Shapes: ``U`` users, ``E`` events of the shard.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from gbla_rec.data.content_hash import ContentHash

Int64Array = NDArray[np.int64]
EVENTS_PER_ROW_GROUP = 1 << 18


@dataclass(frozen=True, slots=True, eq=False)
class HistoryShard:
    """The histories of consecutive users.

    ``offsets`` is ``(U + 1,)`` int64; ``items`` ``(E,)`` int64 item indices, oldest first; ``timestamps`` ``(E,)`` int64
    or ``None``; ``context`` ``(E,)`` int32 codes per column; ``validation_begin`` and ``test_begin`` ``(U,)`` int64,
    relative to the history's first event.
    """

    user_ids: pl.Series
    first_user: int
    """Global row of the shard's first user."""
    offsets: Int64Array
    items: Int64Array
    timestamps: Int64Array | None
    context: dict[str, NDArray[np.int32]]
    validation_begin: Int64Array
    test_begin: Int64Array

    def is_training(self) -> NDArray[np.bool_]:
        """``(E,)`` bool: whether an event is for training."""
        lengths = np.diff(self.offsets)
        places = np.arange(len(self.items)) - np.repeat(self.offsets[:-1], lengths)
        return places < np.repeat(self.validation_begin, lengths)

    def add_to(self, content: ContentHash) -> None:
        """Append the histories to a hash."""
        content.add_series("user_id", self.user_ids)
        columns = {
            "num_events": np.diff(self.offsets),
            "items": self.items,
            "validation_begin": self.validation_begin,
            "test_begin": self.test_begin,
            **{f"codes/{name}": codes for name, codes in self.context.items()},
        }
        if self.timestamps is not None:
            columns["timestamps"] = self.timestamps
        for name, values in columns.items():
            content.add_numbers(f"histories/{name}", values)


def write_shard(path: Path, shard: HistoryShard) -> None:
    """Write a shard; row groups hold about ``EVENTS_PER_ROW_GROUP`` events."""
    arrays: dict[str, Any] = {"user_id": shard.user_ids.to_arrow(), "items": _lists(shard.items, shard.offsets)}
    if shard.timestamps is not None:
        arrays["timestamps"] = _lists(shard.timestamps, shard.offsets)
    arrays |= {name: _lists(codes, shard.offsets) for name, codes in shard.context.items()}
    arrays |= {"validation_begin": shard.validation_begin, "test_begin": shard.test_begin, "num_events": np.diff(shard.offsets)}
    table = pa.table(arrays)
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for users in _row_groups(shard.offsets):
            writer.write_table(table.slice(users.start, len(users)), row_group_size=len(users))


def read_shard(path: Path, first_user: int, context: Sequence[str], *, has_timestamps: bool) -> HistoryShard:
    """Read a shard with some of its context columns.

    Raises:
        ValueError: if the file cannot be read.
    """
    lists = ["items", *(["timestamps"] if has_timestamps else []), *context]
    table = _read(path, ["user_id", *lists, "validation_begin", "test_begin", "num_events"])
    lengths = _numbers(table, "num_events")
    values = {name: _flat(table, name) for name in lists}
    return HistoryShard(
        user_ids=pl.Series("user_id", pl.from_arrow(table.column("user_id"))),
        first_user=first_user,
        offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
        items=values["items"],
        timestamps=values.get("timestamps"),
        context={name: values[name] for name in context},
        validation_begin=_numbers(table, "validation_begin"),
        test_begin=_numbers(table, "test_begin"),
    )


def read_lengths(path: Path) -> tuple[Int64Array, Int64Array, Int64Array]:
    """``validation_begin``, ``test_begin`` and ``num_events`` of a shard, each ``(U,)`` int64, without its events."""
    columns = ("validation_begin", "test_begin", "num_events")
    table = _read(path, columns)
    validation_begin, test_begin, num_events = (_numbers(table, name) for name in columns)
    return validation_begin, test_begin, num_events


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; the prepared dataset is incomplete, prepare it again")
    try:
        table = pq.read_table(path, columns=list(columns), partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the dataset again") from error
    return table


def _lists(values: NDArray[Any], offsets: Int64Array) -> pa.Array:
    kind = pa.ListArray if len(values) < 1 << 31 else pa.LargeListArray
    return kind.from_arrays(pa.array(offsets, pa.int32() if kind is pa.ListArray else pa.int64()), pa.array(values))


def _flat(table: pa.Table, name: str) -> NDArray[Any]:
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(name).chunks]
    dtype = table.schema.field(name).type.value_type.to_pandas_dtype()
    return np.concatenate(chunks) if chunks else np.empty(0, dtype)


def _numbers(table: pa.Table, name: str) -> Int64Array:
    return np.asarray(table.column(name).to_numpy(), dtype=np.int64)


def _row_groups(offsets: Int64Array) -> Iterator[range]:
    first, num_users = 0, len(offsets) - 1
    while first < num_users:
        end = max(first + 1, int(np.searchsorted(offsets, offsets[first] + EVENTS_PER_ROW_GROUP, side="right")) - 1)
        yield range(first, end)
        first = end
