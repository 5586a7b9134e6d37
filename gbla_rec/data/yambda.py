"""Yambda: 4.8 billion listens, likes and dislikes of Yandex Music (Ploshkin et al., arXiv 2505.22238; Apache-2.0).

The schema is that of the dataset card, huggingface.co/datasets/yandex/yambda. *Flat* files have one event a row: uid,
item_id and timestamp (uint32, seconds since the first event, in steps of 5), is_organic (0 or 1); ``listens`` adds
played_ratio_pct and track_length_seconds; ``multi_event`` adds these and event_type (listen, like, dislike, unlike,
undislike). *Sequential* files have one user a row: uid, and lists, which the card calls item_ids and timestamps and the
authors' benchmark code item_id and timestamp; both are read.
"""

import dataclasses
import re
from pathlib import Path

import polars as pl

from gbla_rec.config import PrepareConfig, SplitConfig
from gbla_rec.data.input_files import InputFile, blame, open_file
from gbla_rec.data.published import PublishedDataset, dataset_name, files_like, the_only_file

EVENT_FILES = tuple(f"{name}.parquet" for name in ("multi_event", "listens", "likes", "dislikes", "unlikes", "undislikes"))
DAY_SECONDS = 86_400
GAP_SECONDS = 1_800
LAST_TIMESTAMP = 26_000_000
LISTEN_PLUS_PERCENT = 50
"""A track counts as listened to from here on (Listen+)."""
GLOBAL_TEMPORAL_SPLIT = SplitConfig(
    kind="temporal",
    ties="ordered",
    validation_time=LAST_TIMESTAMP - 2 * DAY_SECONDS - GAP_SECONDS,
    test_time=LAST_TIMESTAMP - DAY_SECONDS,
)
"""The authors' protocol (benchmarks/yambda/constants.py beside the data): the last day is the test, half an hour before it
nobody sees, the day before that validates, and another half hour separates it from the training events."""
CONTEXT = ("is_organic", "event_type")


def yambda_dataset(path: Path) -> PublishedDataset:
    """How to prepare one of Yambda's files of events, flat or sequential, under the published global temporal split.

    Left out are the events in the gaps before validation and test and, of ``listens``, those that are no Listen+, as in
    the published benchmark. Another split moves the gaps; a split that is not temporal has none.

    Args:
        path: a file of events (``listens.parquet``, ...), or a directory with one of them.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if there is no file of events, or more than one, or it lacks a column.
    """
    files = files_like(path, re.compile("|".join(map(re.escape, EVENT_FILES))))
    file = open_file(the_only_file(path, files, EVENT_FILES))
    item_column = next((name for name in ("item_id", "item_ids") if name in file.schema), "item_id")
    timestamp_column = next((name for name in ("timestamp", "timestamps") if name in file.schema), "timestamp")
    file.require_columns(
        ["uid", item_column, timestamp_column, "is_organic"],
        "Yambda",
        cure="it is not in the published form; prepare it as a log of your own, with --events",
    )
    is_sequential = isinstance(file.schema[item_column], pl.List)
    size = file.path.resolve().parent.name
    config = PrepareConfig(
        name=dataset_name("yambda", f"{size}_{file.path.stem}" if re.fullmatch(r"\d+[mb]", size) else file.path.stem),
        events=file.path,
        user_column="uid",
        item_column=item_column,
        timestamp_column=timestamp_column,
        sequence_column=item_column if is_sequential else None,
        context_columns=tuple(name for name in CONTEXT if name in file.schema),
        split=GLOBAL_TEMPORAL_SPLIT,
    )
    return PublishedDataset(form=f"{'sequential' if is_sequential else 'flat'} {file.path.stem}", config=config, convert=convert_events)


def convert_events(config: PrepareConfig, directory: Path) -> PrepareConfig:
    """Write the events of the benchmark, one a row and in their order, as Parquet into ``directory``.

    Raises:
        ValueError: if the file cannot be read, or the lists of a user differ in length.
    """
    file = open_file(config.events)
    with blame([file.path]):
        events = _flat(file, config).filter(_is_kept(file, config))
        events.sink_parquet(directory / "events.parquet")
    return dataclasses.replace(config, events=directory / "events.parquet", sequence_column=None)


def _flat(file: InputFile, config: PrepareConfig) -> pl.LazyFrame:
    frame = file.frame.select(*file.schema)
    if config.sequence_column is None:
        return frame
    lists = [name for name, dtype in file.schema.items() if isinstance(dtype, pl.List)]
    return frame.filter(pl.col(config.sequence_column).list.len().ne_missing(0)).explode(lists)


def _is_kept(file: InputFile, config: PrepareConfig) -> pl.Expr:
    kept = pl.lit(True)
    if "played_ratio_pct" in file.schema and "event_type" not in file.schema:
        kept &= pl.col("played_ratio_pct") >= LISTEN_PLUS_PERCENT
    if config.split.kind == "temporal":
        for time in (config.split.validation_time, config.split.test_time):
            if time is not None:
                kept &= ~pl.col(config.timestamp_column).is_between(time - GAP_SECONDS, time, closed="left")
    return kept
