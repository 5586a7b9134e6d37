"""From an event log to a prepared dataset, in bounded memory, all or nothing.

Passes: check every value; count users, items and context values; encode the events and partition them by shard on disk;
sort and write one shard at a time. Held in memory: the distinct users, items and context values, and one shard.
"""

import dataclasses
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.config import PrepareConfig
from gbla_rec.data.content_hash import ContentHash
from gbla_rec.data.dataset import PreparedDataset, add_items
from gbla_rec.data.events import ITEM, PREFIX, TIME, USER, EventLog, open_events
from gbla_rec.data.item_table import open_item_table
from gbla_rec.data.new_directory import new_directory
from gbla_rec.data.published import Convert
from gbla_rec.data.schema import (
    CONTEXT_DIR,
    HISTORIES_DIR,
    ITEMS_NAME,
    MANIFEST_NAME,
    SCHEMA_VERSION,
    ContextInfo,
    DatasetManifest,
    ShardInfo,
    SplitInfo,
    context_path,
    shard_path,
)
from gbla_rec.data.shard_files import HistoryShard, write_shard
from gbla_rec.data.spill import LOG_CHANGED, Spill
from gbla_rec.data.splits import resolve_split, split_points
from gbla_rec.data.vocabulary import COUNT, Vocabulary, build_vocabulary, shard_ranges

logger = logging.getLogger(__name__)

SPILL_DIR = "spill"
CONVERTED_DIR = "converted"
MANY_REPEATED = 0.01
"""Part of the events; a log that was exported twice has half."""
LENGTH_QUANTILES = {"min": 0.0, "p25": 0.25, "p50": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


def prepare(config: PrepareConfig, output: Path, convert: Convert | None = None) -> PreparedDataset:
    """Prepare the log of ``config`` as the new directory ``output``.

    The content, and so ``content_hash``, does not depend on ``max_events_per_shard``, on the file format or (with
    ``ties="together"``) on the order of the rows. Nothing is left behind on an error.

    Args:
        config: what to prepare, and how.
        output: must not exist.
        convert: for files that are neither Parquet nor CSV; what it writes is deleted at the end.

    Raises:
        FileExistsError: if ``output`` exists.
        FileNotFoundError: if an input does not exist.
        ValueError: if the input is bad; the message names the file, the column and the row (of a CSV: the line).
    """
    with new_directory(output) as directory:
        readable = config if convert is None else _converted(config, convert, directory)
        table = open_item_table(readable)
        log = open_events(readable, "unknown" if table is None else table.kind)
        vocabulary = build_vocabulary(log, table)
        counts = vocabulary.users[COUNT].to_numpy()
        shards = shard_ranges(counts, config.max_events_per_shard)
        keep_order = config.split.ties == "ordered" or not log.has_timestamps
        spill = Spill(directory / SPILL_DIR, log, shards, keep_order=keep_order)
        spill.write(vocabulary)
        split = resolve_split(config.split, spill.times if log.has_timestamps else None)
        totals = _write_shards(directory, log, vocabulary, spill, shards, split)
        _warn_of_repeated_events(totals)
        (directory / SPILL_DIR).rmdir()
        if convert is not None:
            shutil.rmtree(directory / CONVERTED_DIR)
        _write_items(directory, vocabulary, totals)
        _write_context(directory, vocabulary, totals)
        manifest = _manifest(config, log, vocabulary, split, totals)
        (directory / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    return PreparedDataset.open(output)


def _converted(config: PrepareConfig, convert: Convert, directory: Path) -> PrepareConfig:
    (directory / CONVERTED_DIR).mkdir()
    return convert(config, directory / CONVERTED_DIR)


@dataclasses.dataclass(slots=True)
class _Totals:
    """What is summed up while the shards are written."""

    train_counts: NDArray[np.int64]
    content: ContentHash = dataclasses.field(default_factory=ContentHash)
    shards: list[ShardInfo] = dataclasses.field(default_factory=list)
    num_validation_users: int = 0
    num_test_users: int = 0
    num_repeated: int = 0

    def add(self, shard: HistoryShard) -> None:
        self.train_counts += np.bincount(shard.items[shard.is_training()], minlength=len(self.train_counts))
        self.num_validation_users += int(np.sum((shard.validation_begin > 0) & (shard.test_begin > shard.validation_begin)))
        self.num_test_users += int(np.sum((shard.test_begin > 0) & (np.diff(shard.offsets) > shard.test_begin)))
        self.num_repeated += _count_repeated(shard)
        shard.add_to(self.content)
        self.shards.append(ShardInfo(shard_path(len(self.shards)), len(shard.user_ids), len(shard.items)))


def _write_shards(
    directory: Path,
    log: EventLog,
    vocabulary: Vocabulary,
    spill: Spill,
    shards: Sequence[range],
    split: SplitInfo,
) -> _Totals:
    (directory / HISTORIES_DIR).mkdir()
    totals = _Totals(np.zeros(len(vocabulary.items), np.int64))
    for index, users in enumerate(shards):
        columns = spill.take_sorted(index)
        counts = vocabulary.users[COUNT][users.start : users.stop].to_numpy()
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        if not np.array_equal(np.bincount(columns[USER] - users.start, minlength=len(users)), counts):
            raise ValueError(LOG_CHANGED)
        timestamps = columns.get(TIME)
        validation_begin, test_begin = split_points(offsets, timestamps, split)
        shard = HistoryShard(
            user_ids=vocabulary.users[USER][users.start : users.stop].alias("user_id"),
            first_user=users.start,
            offsets=offsets,
            items=columns[ITEM],
            timestamps=timestamps,
            context={name: columns[PREFIX + name] for name in log.context},
            validation_begin=validation_begin,
            test_begin=test_begin,
        )
        write_shard(directory / shard_path(index), shard)
        totals.add(shard)
    return totals


def _count_repeated(shard: HistoryShard) -> int:
    """Events equal to the one before them in user, time, item and context; without times a repeat is a history like any other."""
    if shard.timestamps is None or not len(shard.items):
        return 0
    columns: list[NDArray[Any]] = [shard.items, shard.timestamps, *shard.context.values()]
    is_repeated = np.logical_and.reduce([column[1:] == column[:-1] for column in columns])
    starts = shard.offsets[1:-1]
    is_repeated[starts[(starts > 0) & (starts < len(shard.items))] - 1] = False
    return int(is_repeated.sum())


def _warn_of_repeated_events(totals: _Totals) -> None:
    num_events = sum(shard.num_events for shard in totals.shards)
    if totals.num_repeated > MANY_REPEATED * num_events:
        logger.warning(
            "%d of %d events repeat another one of their user in item, time and context, and are kept; if the log has rows twice, remove "
            "them: prepare takes each for an event",
            totals.num_repeated,
            num_events,
        )


def _write_items(directory: Path, vocabulary: Vocabulary, totals: _Totals) -> None:
    texts = [column for column in vocabulary.items.columns if column != "item_id"]
    items = vocabulary.items.select(
        pl.int_range(pl.len(), dtype=pl.Int64).alias("item_index"),
        "item_id",
        pl.Series("num_train_events", totals.train_counts),
        *texts,
    )
    items.write_parquet(directory / ITEMS_NAME, row_group_size=1 << 16)
    add_items(totals.content, items)


def _write_context(directory: Path, vocabulary: Vocabulary, totals: _Totals) -> None:
    (directory / CONTEXT_DIR).mkdir()
    for name, values in vocabulary.context.items():
        codes = pl.int_range(len(values), dtype=pl.Int64, eager=True)
        pl.DataFrame({"code": codes, "value": values}).write_parquet(directory / context_path(name))
        totals.content.add_series(f"context/{name}", values)


def _manifest(config: PrepareConfig, log: EventLog, vocabulary: Vocabulary, split: SplitInfo, totals: _Totals) -> DatasetManifest:
    lengths = vocabulary.users[COUNT].to_numpy()
    quantiles = {name: float(np.quantile(lengths, q, method="lower")) for name, q in LENGTH_QUANTILES.items()}
    source: dict[str, Any] = dataclasses.asdict(config) | {"num_files": len(log.paths)}
    return DatasetManifest(
        schema_version=SCHEMA_VERSION,
        name=config.name,
        num_users=len(vocabulary.users),
        num_items=len(vocabulary.items),
        num_events=int(lengths.sum()),
        has_timestamps=log.has_timestamps,
        user_id_type=log.user_id_type,
        item_id_type=log.item_id_type,
        split=split,
        context=tuple(ContextInfo(name, len(values)) for name, values in vocabulary.context.items()),
        text_columns=tuple(column for column in vocabulary.items.columns if column != "item_id"),
        length_quantiles={"mean": float(lengths.mean()), **quantiles},
        num_validation_users=totals.num_validation_users,
        num_test_users=totals.num_test_users,
        content_hash=totals.content.hexdigest(),
        shards=tuple(totals.shards),
        source=source,
    )
