"""Events partitioned by shard in temporary files of fixed-width records, so that a shard is sorted in memory alone."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.data.events import FILE, ITEM, PLACE, PREFIX, TIME, USER, EventLog
from gbla_rec.data.input_files import ROW, blame
from gbla_rec.data.vocabulary import Vocabulary

EVENTS_PER_BATCH = 500_000
LOG_CHANGED = "the log changed while it was read: an event was not there when users, items and contexts were counted, or is gone"
Records = NDArray[np.void]


class Spill:
    """Encoded events of a log on disk, one file a shard.

    A record has the fields ``USER`` (global row), ``ITEM`` (index), ``TIME`` if the log has times, ``PREFIX + name``
    (codes), and, where the order of the log counts, the original place.
    """

    def __init__(self, directory: Path, log: EventLog, shards: Sequence[range], *, keep_order: bool) -> None:
        """Make the directory; ``keep_order`` keeps the original place of each event as a sort key."""
        directory.mkdir()
        self._directory = directory
        self._log = log
        self._first_users = np.array([users.start for users in shards], np.int64)
        self._places = (FILE, ROW, PLACE) if keep_order else ()
        times = (TIME,) if log.has_timestamps else ()
        codes = tuple(PREFIX + name for name in log.context)
        self._dtype = np.dtype([(name, "<i4" if name in codes else "<i8") for name in (USER, *times, ITEM, *codes, *self._places)])
        self._sort_keys = (USER, *times, *(self._places or (ITEM, *codes)))

    def write(self, vocabulary: Vocabulary) -> None:
        """Encode all events in one streaming pass and append each to the file of its shard."""
        frame = _encode(self._log, vocabulary).select(self._dtype.names or ())
        with blame(self._log.paths):
            for batch in frame.collect_batches(chunk_size=EVENTS_PER_BATCH, maintain_order=False, engine="streaming"):
                self._append(batch)

    def times(self) -> Iterator[NDArray[np.int64]]:
        """The timestamps of all events, a shard at a time, in no particular order."""
        for shard in range(len(self._first_users)):
            yield np.ascontiguousarray(self._read(shard)[TIME])

    def take_sorted(self, shard: int) -> dict[str, NDArray[Any]]:
        """The columns of a shard sorted by user and then time; its file is deleted."""
        records = self._read(shard)
        columns = pl.DataFrame({name: np.ascontiguousarray(records[name]) for name in self._dtype.names or ()})
        del records
        self._path(shard).unlink()
        return {series.name: series.to_numpy() for series in columns.sort(self._sort_keys) if series.name not in self._places}

    def _append(self, batch: pl.DataFrame) -> None:
        if any(batch.null_count().row(0)):
            raise ValueError(LOG_CHANGED)
        records = np.empty(len(batch), self._dtype)
        for name in self._dtype.names or ():
            records[name] = batch[name].to_numpy()
        shards = np.searchsorted(self._first_users, records[USER], side="right") - 1
        records = records[np.argsort(shards, kind="stable")]
        counts = np.bincount(shards)
        ends = np.cumsum(counts)
        for shard in np.flatnonzero(counts):
            with self._path(int(shard)).open("ab") as file:
                file.write(records[ends[shard] - counts[shard] : ends[shard]].tobytes())

    def _read(self, shard: int) -> Records:
        return np.fromfile(self._path(shard), self._dtype)

    def _path(self, shard: int) -> Path:
        return self._directory / f"{shard:05d}.bin"


def _encode(log: EventLog, vocabulary: Vocabulary) -> pl.LazyFrame:
    frame = log.frame
    columns = {USER: vocabulary.users[USER], ITEM: vocabulary.items["item_id"]}
    columns |= {PREFIX + name: values for name, values in vocabulary.context.items()}
    for name, values in columns.items():
        codes = pl.int_range(len(values), dtype=pl.Int64, eager=True)
        lookup = pl.DataFrame({name: values, f"{name}:code": codes})
        # a missing category is a value of its own
        is_category = name.startswith(PREFIX)
        frame = frame.join(lookup.lazy(), on=name, how="left", nulls_equal=is_category).drop(name).rename({f"{name}:code": name})
    return frame
