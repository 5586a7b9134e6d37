"""The item table: every item of the catalogue with its text, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import polars as pl

from gbla_rec.config import PrepareConfig
from gbla_rec.data.column_kinds import Kind, id_values, is_text, join_kinds, kind_of_dtype, kind_of_text, text_counts
from gbla_rec.data.input_files import ROW, InputFile, blame, find_files, open_file
from gbla_rec.data.row_places import place_of_row
from gbla_rec.data.schema import ITEM_COLUMNS

LIST_SEPARATOR = ", "


@dataclass(frozen=True, slots=True)
class ItemTable:
    """The files of an item table, opened but not read."""

    files: tuple[InputFile, ...]
    item_column: str
    text_columns: tuple[str, ...]
    kind: Kind
    """Kind of the ids: int64 or string."""

    def read(self, kind: Kind) -> pl.DataFrame:
        """All items: ``item_id`` of ``kind`` and the text columns, in the order of the files.

        Raises:
            ValueError: if an id is missing, does not fit int64 or occurs twice; the message names file and row (of a CSV: the line).
        """
        with blame([file.path for file in self.files]):
            parts = [self._read_file(file, number, kind) for number, file in enumerate(self.files)]
        frame = pl.concat(parts)
        for row in frame.filter(pl.col("item_id").is_null()).head(1).iter_rows(named=True):
            path = self.files[row["file"]].path
            where = f"{path}: column {self.item_column!r}, {place_of_row(path, row[ROW])}"
            raise ValueError(f"{where}: the id is missing or does not fit int64")
        self._check_unique(frame)
        return frame.drop("file", ROW)

    def _read_file(self, file: InputFile, number: int, kind: Kind) -> pl.DataFrame:
        texts = (_text_values(file, column).alias(column) for column in self.text_columns)
        item_id = id_values(pl.col(self.item_column), kind).alias("item_id")
        return file.frame.select(item_id, *texts, pl.lit(number).alias("file"), ROW).collect(engine="streaming")

    def _check_unique(self, frame: pl.DataFrame) -> None:
        twice = frame.with_row_index("place").filter(pl.col("item_id").is_duplicated())
        if len(twice):
            item_id = twice["item_id"][0]
            rows = twice.filter(pl.col("item_id") == item_id).head(2).rows(named=True)
            paths = [self.files[row["file"]].path for row in rows]
            where = " and ".join(f"{path} {place_of_row(path, row[ROW])}" for path, row in zip(paths, rows, strict=True))
            raise ValueError(
                f"item table: {self.item_column} {item_id!r} occurs more than once: {where}; "
                f"{twice['item_id'].n_unique()} ids are duplicated"
            )


def open_item_table(config: PrepareConfig) -> ItemTable | None:
    """Open the item table of ``config``; ``None`` if it has none.

    Raises:
        FileNotFoundError: if the table does not exist.
        ValueError: if a column is missing or of a type that is no id or no text, or a row of a CSV has too many or too few fields.
    """
    if config.items is None:
        if config.text_columns:
            raise ValueError(f"--text-columns {' '.join(config.text_columns)} needs an item table; name it with --items")
        return None
    files = tuple(open_file(path) for path in find_files(config.items, "--items"))
    kinds = []
    for file in files:
        file.require_columns([config.item_column], "item", cure="name it as the events do (--item-column)")
        file.require_columns(config.text_columns, "text", cure="name others with --text-columns")
        file.require_equal_widths()
        with blame([file.path]):
            kinds.append(_id_kind(file, config.item_column))
    text_columns = config.text_columns or _string_columns(files, config.item_column)
    _check_text_columns(files, text_columns)
    return ItemTable(files, config.item_column, text_columns, join_kinds(kinds))


def _id_kind(file: InputFile, column: str) -> Kind:
    dtype = file.schema[column]
    kind = _kinds_of_text(file, [column])[column] if file.is_csv else kind_of_dtype(dtype)
    kind = "string" if file.is_csv and kind == "float64" else kind
    if kind not in ("int64", "string", "unknown"):
        raise ValueError(f"{file.path}: column {column!r} is {dtype}; ids must be integers or strings")
    return cast(Kind, kind)


def _string_columns(files: Sequence[InputFile], item_column: str) -> tuple[str, ...]:
    """Columns of every file that hold strings; a CSV column of numbers only is not text."""
    shared = [column for column in files[0].schema if column != item_column and all(column in file.schema for file in files)]
    is_string = {column: True for column in shared if all(is_text(file.schema[column]) for file in files)}
    for file in files:
        if file.is_csv and is_string:
            with blame([file.path]):
                kinds = _kinds_of_text(file, list(is_string))
            is_string = {column: True for column in is_string if kinds[column] == "string"}
    return tuple(is_string)


def _kinds_of_text(file: InputFile, columns: Sequence[str]) -> dict[str, Kind]:
    wanted = (count for column in columns for count in text_counts(column))
    counts = file.frame.select(*wanted).collect(engine="streaming").row(0, named=True)
    return {column: kind_of_text(counts, column) for column in columns}


def _check_text_columns(files: Sequence[InputFile], columns: Sequence[str]) -> None:
    for column in columns:
        if column in ITEM_COLUMNS:
            raise ValueError(f"PrepareConfig.text_columns: {column!r} is a name of the prepared items {ITEM_COLUMNS}; rename the column")
        for file in files:
            dtype = file.schema[column]
            if dtype.is_nested() and dtype != pl.List(pl.String):
                raise ValueError(f"{file.path}: text column {column!r} is {dtype}; it must hold single values or lists of strings")


def _text_values(file: InputFile, column: str) -> pl.Expr:
    if file.schema[column] == pl.List(pl.String):
        return pl.col(column).list.join(LIST_SEPARATOR, ignore_nulls=True)
    return pl.col(column).cast(pl.String)
