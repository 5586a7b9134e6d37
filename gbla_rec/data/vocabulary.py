"""Who and what occurs in a log: users with their event counts, items, and context values, each sorted."""

import logging
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.data.events import FILE, ITEM, PREFIX, USER, EventLog
from gbla_rec.data.input_files import ROW
from gbla_rec.data.item_table import ItemTable

logger = logging.getLogger(__name__)
COUNT = "num_events"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """``users`` (USER, num_events) and ``items`` (item_id, text columns) are sorted by id, ``context`` values by value."""

    users: pl.DataFrame
    items: pl.DataFrame
    context: dict[str, pl.Series]


def build_vocabulary(log: EventLog, table: ItemTable | None) -> Vocabulary:
    """Count users, items and context values in streaming passes; only the distinct values are held.

    Items of the log that the item table lacks are kept, without text, and a warning counts them, as one counts the events of blank ids.

    Raises:
        ValueError: if a user of a grouped log has more than one row, or the item table has a bad row or no item of the log.
    """
    context = {name: _distinct(log.frame, PREFIX + name) for name in log.context}
    seen = log.frame.group_by(ITEM).agg(pl.len().alias(COUNT)).collect(engine="streaming")
    items = seen.select(pl.col(ITEM).alias("item_id"))
    if table is not None:
        catalogue = table.read("string" if log.item_id_type == "string" else "int64")
        absent = seen.join(catalogue, left_on=ITEM, right_on="item_id", how="anti")
        _require_shared_items(table, catalogue, absent, len(seen))
        _warn_of_absent_items(absent, len(seen), int(seen[COUNT].sum()))
        items = pl.concat([catalogue, absent.select(pl.col(ITEM).alias("item_id"))], how="diagonal")
    users = _users(log)
    for kind, ids, counts in (("user", users[USER], users[COUNT]), ("item", seen[ITEM], seen[COUNT])):
        _warn_of_blank_ids(kind, ids, counts)
    return Vocabulary(users, items.sort("item_id"), context)


def shard_ranges(counts: NDArray[np.int64], max_events: int) -> list[range]:
    """Consecutive users in shards of at most ``max_events`` events; a user with more has a shard alone.

    Args:
        counts: ``(U,)`` int64, events of each user.
        max_events: the bound of a shard.
    """
    ends = np.cumsum(counts)
    ranges, first = [], 0
    while first < len(counts):
        before = int(ends[first - 1]) if first else 0
        end = max(first + 1, int(np.searchsorted(ends, before + max_events, side="right")))
        ranges.append(range(first, end))
        first = end
    return ranges


def _users(log: EventLog) -> pl.DataFrame:
    wanted = [pl.len().cast(pl.Int64).alias(COUNT)]
    if log.is_grouped:
        wanted += [pl.col(name).min().alias(f"{name}:min") for name in (FILE, ROW)]
        wanted += [pl.col(name).max().alias(f"{name}:max") for name in (FILE, ROW)]
    users = log.frame.group_by(USER).agg(*wanted).collect(engine="streaming")
    if log.is_grouped:
        is_twice = (pl.col(f"{FILE}:min") != pl.col(f"{FILE}:max")) | (pl.col(f"{ROW}:min") != pl.col(f"{ROW}:max"))
        for user in users.filter(is_twice).sort(USER).head(1).iter_rows(named=True):
            where = " and ".join(f"{log.paths[user[f'{FILE}:{end}']]} row {user[f'{ROW}:{end}']}" for end in ("min", "max"))
            raise ValueError(f"user {user[USER]!r} has more than one sequence: {where} (from 0); with sequence_column each user is one row")
    return users.select(USER, COUNT).sort(USER)


def _distinct(frame: pl.LazyFrame, column: str) -> pl.Series:
    values = frame.group_by(column).agg().collect(engine="streaming")
    return values.sort(column, nulls_last=True).to_series().alias("value")


def _require_shared_items(table: ItemTable, catalogue: pl.DataFrame, absent: pl.DataFrame, num_items: int) -> None:
    """A table without one item of the log is another catalogue, or writes its ids in another way: no event would have text."""
    if num_items and len(absent) == num_items:
        there = f"its own are such as {catalogue['item_id'].min()!r}" if len(catalogue) else "it has no row"
        raise ValueError(
            f"item table {table.files[0].path}: column {table.item_column!r} must hold ids of items of the log, and has none of the log's "
            f"{num_items}, e.g. {absent[ITEM].min()!r}: {there}; write the ids as the log does (007 is not 7), give the table of this log, "
            "or prepare without an item table"
        )


def _warn_of_absent_items(absent: pl.DataFrame, num_items: int, num_events: int) -> None:
    if len(absent):
        logger.warning(
            "%d of %d items of the log (%d of %d events) are absent from the item table and have no text, e.g. %r",
            len(absent),
            num_items,
            int(absent[COUNT].sum()),
            num_events,
            absent[ITEM].min(),
        )


def _warn_of_blank_ids(kind: str, ids: pl.Series, counts: pl.Series) -> None:
    """Some writers of CSV put a missing value in quotes: then all events without a user are one long history."""
    if ids.dtype != pl.String:
        return
    is_blank = ids.str.strip_chars() == ""
    if is_blank.any():
        logger.warning(
            "%d of %d events have a blank %s id, %r, which is an id like any other; if it stands for a missing one, remove these events",
            int(counts.filter(is_blank).sum()),
            int(counts.sum()),
            kind,
            ids.filter(is_blank).min(),
        )
