"""An event log in any of its forms as one lazy frame with fixed columns and exact types.

The forms: one event a row; or one user a row, with a list of items, and optionally lists of timestamps and contexts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import polars as pl

from gbla_rec.config import PrepareConfig
from gbla_rec.data.column_kinds import (
    Kind,
    category_values,
    id_values,
    is_text,
    join_kinds,
    kind_of_dtype,
    kind_of_text,
    kind_of_time_text,
    text_counts,
    time_values,
)
from gbla_rec.data.input_files import ROW, InputFile, blame, find_files, open_file
from gbla_rec.data.row_places import place_of_row
from gbla_rec.data.schema import HISTORY_COLUMNS, IdType

USER, ITEM, TIME, FILE, PLACE = "user", "item", "time", "__file", "__place"
PREFIX = "context:"
WIDE_INTEGERS = (pl.UInt64, pl.Int128, pl.UInt128)


@dataclass(frozen=True, slots=True)
class EventLog:
    """All events of a log.

    ``frame`` has the columns ``USER`` and ``ITEM`` (int64 or string, never null), ``TIME`` (int64, if
    ``has_timestamps``), ``PREFIX + name`` for each context column (null is a value of its own) and the original place
    ``FILE``, ``ROW``, ``PLACE`` (place in the row's list), all int64.
    """

    paths: list[Path]
    frame: pl.LazyFrame
    user_id_type: IdType
    item_id_type: IdType
    context: tuple[str, ...]
    has_timestamps: bool
    is_grouped: bool
    """Whether the log had one user a row."""


def open_events(config: PrepareConfig, item_table_kind: Kind = "unknown") -> EventLog:
    """Open a log and check every value of it in one streaming pass.

    Args:
        config: names the files and columns.
        item_table_kind: kind of the item ids in the item table; ids become strings if either side has strings.

    Raises:
        FileNotFoundError: if the log does not exist.
        ValueError: naming file, column and row (of a CSV: the line) of the first bad value.
    """
    _check_context_names(config.context_columns)
    paths = find_files(config.events, "--events")
    files = [open_file(path) for path in paths]
    with blame(paths):
        has_timestamps = _has_timestamps(config, files)
        flat = [_flatten(config, file, has_timestamps) for file in files]
        for file in files:
            file.require_equal_widths()
        kinds = _resolve_kinds(config, flat, has_timestamps)
        kinds[ITEM] = "string" if "string" in (item_table_kind, kinds[ITEM]) else kinds[ITEM]
        parts = [_typed(file, kinds, number) for number, file in enumerate(flat)]
        _check_values(config, flat, kinds)
    return EventLog(
        paths=paths,
        frame=pl.concat(parts),
        user_id_type=_id_type(kinds[USER]),
        item_id_type=_id_type(kinds[ITEM]),
        context=config.context_columns,
        has_timestamps=has_timestamps,
        is_grouped=config.sequence_column is not None,
    )


def _check_context_names(names: Sequence[str]) -> None:
    for name in names:
        if name in HISTORY_COLUMNS or not name or name.startswith(".") or "/" in name or "\0" in name:
            raise ValueError(
                f"PrepareConfig.context_columns: {name!r} cannot be stored (it must not contain '/', begin with '.' "
                f"or be one of {HISTORY_COLUMNS}); rename the column"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"PrepareConfig.context_columns names a column twice: {tuple(names)}")


def _has_timestamps(config: PrepareConfig, files: Sequence[InputFile]) -> bool:
    having = [file for file in files if config.timestamp_column in file.schema]
    if config.sequence_column is None or len(having) == len(files):
        return True
    if having:
        lacking = next(file for file in files if config.timestamp_column not in file.schema)
        raise ValueError(f"{lacking.path}: timestamp column {config.timestamp_column!r} is missing, but {having[0].path} has it")
    return False


def _flatten(config: PrepareConfig, file: InputFile, has_timestamps: bool) -> InputFile:
    """One event a row, with the columns named by their role and still of the file's types."""
    columns = {USER: config.user_column, ITEM: config.sequence_column or config.item_column}
    if has_timestamps:
        columns[TIME] = config.timestamp_column
    columns |= {PREFIX + name: name for name in config.context_columns}
    for role, column in columns.items():
        what = role.split(":")[0] if role != ITEM or not config.sequence_column else "sequence"
        option = "--context-columns" if role.startswith(PREFIX) else "--timestamp-column" if role == TIME else f"--{what}-column"
        file.require_columns([column], what, cure=f"name another one with {option}")
    if config.sequence_column is None:
        frame = file.frame.select(*(pl.col(column).alias(role) for role, column in columns.items()), ROW, pl.lit(0, pl.Int64).alias(PLACE))
        return InputFile(file.path, file.is_csv, frame, {role: file.schema[column] for role, column in columns.items()})
    lists = [role for role in columns if role != USER]
    for role in lists:
        if not isinstance(file.schema[columns[role]], pl.List | pl.Array):
            raise ValueError(
                f"{file.path}: column {columns[role]!r} is {file.schema[columns[role]]}, but with sequence_column "
                "every column except the user's must be a list (Parquet); for one event a row leave sequence_column out"
            )
    frame = file.frame.select(*(pl.col(column).alias(role) for role, column in columns.items()), ROW)
    _check_lists(file.path, frame, columns, lists)
    places = pl.int_ranges(0, pl.col(ITEM).list.len(), dtype=pl.Int64).alias(PLACE)
    frame = frame.with_columns(pl.col(role).cast(pl.List(file.schema[columns[role]].inner)) for role in lists)  # type: ignore[attr-defined]
    frame = frame.filter(pl.col(ITEM).list.len() > 0).with_columns(places).explode([*lists, PLACE])
    schema = {role: file.schema[column] for role, column in columns.items()}
    return InputFile(file.path, False, frame, schema | {role: schema[role].inner for role in lists})  # type: ignore[attr-defined]


def _check_lists(path: Path, frame: pl.LazyFrame, columns: dict[str, str], lists: Sequence[str]) -> None:
    def length(role: str) -> pl.Expr:
        return pl.col(role).list.len()

    for role in lists:
        bad = length(role).is_null() | length(role).ne_missing(length(ITEM))
        row = frame.filter(bad).select(pl.col(ROW).min()).collect(engine="streaming").item()
        if row is not None:
            rule = "is null" if role == ITEM else f"is null or not as long as {columns[ITEM]!r}"
            raise ValueError(f"{path}: column {columns[role]!r}, row {row} (from 0): the list {rule}")


def _resolve_kinds(config: PrepareConfig, files: Sequence[InputFile], has_timestamps: bool) -> dict[str, Kind]:
    found: dict[str, list[Kind]] = {role: [] for role in files[0].schema}
    for file in files:
        texts = [role for role, dtype in file.schema.items() if is_text(dtype) and (file.is_csv or role == TIME)]
        counts: dict[str, int] = {}
        if texts:
            wanted = (count for role in texts for count in text_counts(role))
            counts = file.frame.select(*wanted).collect(engine="streaming").row(0, named=True)
        for role, dtype in file.schema.items():
            if role in texts:
                kind: Kind | None = kind_of_time_text(counts, role) if role == TIME else kind_of_text(counts, role)
                kind = "string" if role in (USER, ITEM) and kind == "float64" else kind
            else:
                kind = kind_of_dtype(dtype)
            _check_kind(file.path, _column_name(config, role), role, kind, dtype)
            found[role].append(cast(Kind, kind))
    if has_timestamps:
        _check_one_time_unit(files, found[TIME], config.timestamp_column)
    return {role: join_kinds(kinds) for role, kinds in found.items()}


def _check_kind(path: Path, column: str, role: str, kind: Kind | None, dtype: pl.DataType) -> None:
    allowed = {USER: ("int64", "string"), ITEM: ("int64", "string"), TIME: ("int64", "time")}
    if kind is None or kind not in ("unknown", *allowed.get(role, (kind,))):
        rule = {
            USER: "ids must be integers or strings",
            ITEM: "ids must be integers or strings",
            TIME: "timestamps must be integers, dates, datetimes or ISO-8601 strings",
        }
        raise ValueError(f"{path}: column {column!r} is {dtype}; {rule.get(role, 'a context column must hold single values')}")


def _check_one_time_unit(files: Sequence[InputFile], kinds: Sequence[Kind], column: str) -> None:
    first: dict[Kind, Path] = {}
    for file, kind in zip(files, kinds, strict=True):
        first.setdefault(kind, file.path)
    if "int64" in first and "time" in first:
        raise ValueError(f"column {column!r} is an integer in {first['int64']} but a date in {first['time']}; use one form in all files")


def _value(file: InputFile, role: str, kinds: dict[str, Kind]) -> pl.Expr:
    if role in (USER, ITEM):
        return id_values(pl.col(role), kinds[role])
    if role == TIME:
        return time_values(pl.col(role), kinds[role], file.schema[role])
    return category_values(pl.col(role), kinds[role])


def _typed(file: InputFile, kinds: dict[str, Kind], number: int) -> pl.LazyFrame:
    values = (_value(file, role, kinds).alias(role) for role in file.schema)
    return file.frame.select(*values, pl.lit(number, pl.Int64).alias(FILE), ROW, PLACE)


def _check_values(config: PrepareConfig, files: Sequence[InputFile], kinds: dict[str, Kind]) -> None:
    num_events = 0
    for file in files:
        bad = {role: _is_bad(file, role, kinds) for role in file.schema}
        counts = file.frame.select(pl.len().alias("events"), **{role: is_bad.sum() for role, is_bad in bad.items()})
        row = counts.collect(engine="streaming").row(0, named=True)
        num_events += row["events"]
        for role, is_bad in bad.items():
            if row[role]:
                _raise_bad_value(file, role, _column_name(config, role), is_bad, row[role])
    if num_events == 0:
        raise ValueError(f"{config.events}: the log has no events")


def _is_bad(file: InputFile, role: str, kinds: dict[str, Kind]) -> pl.Expr:
    """A missing id or time, or an integer that does not fit int64; a missing category is allowed."""
    raw, value = pl.col(role), _value(file, role, kinds)
    if not role.startswith(PREFIX):
        return value.is_null()
    return raw.is_not_null() & value.is_null() if file.schema[role] in WIDE_INTEGERS else pl.lit(False)


def _raise_bad_value(file: InputFile, role: str, column: str, is_bad: pl.Expr, count: int) -> None:
    row = file.frame.filter(is_bad).select(pl.col(ROW).min()).collect(engine="streaming").item()
    found = file.frame.filter((pl.col(ROW) == row) & is_bad).select(role).head(1).collect(engine="streaming").item()
    where = f"{file.path}: column {column!r}, {place_of_row(file.path, row)}"
    many = f"; {count} such values in the file" if count > 1 else ""
    if found is None:
        raise ValueError(f"{where}: the value is missing; drop or fill such rows{many}")
    rule = (
        "is not a timestamp (an int64, or an ISO-8601 date or time; round fractions of a second to an int64)"
        if role == TIME
        else "does not fit int64"
    )
    raise ValueError(f"{where}: {found!r} {rule}{many}")


def _column_name(config: PrepareConfig, role: str) -> str:
    if role.startswith(PREFIX):
        return role[len(PREFIX) :]
    return {USER: config.user_column, ITEM: config.sequence_column or config.item_column, TIME: config.timestamp_column}[role]


def _id_type(kind: Kind) -> IdType:
    return "string" if kind == "string" else "int64"
