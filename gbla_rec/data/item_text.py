"""Which columns of an item table hold text."""

import polars as pl

from gbla_rec.data.column_kinds import is_text
from gbla_rec.data.input_files import InputFile, blame

IDENTIFIERS = ("item_id", "asin")
"""String columns that are no text."""


def text_columns(items: InputFile) -> tuple[str, ...]:
    """Columns of strings, or of lists of strings, with text in at least one row, the title first; identifiers are no text."""
    columns = [name for name, dtype in items.schema.items() if name not in IDENTIFIERS and (is_text(dtype) or dtype == pl.List(pl.String))]
    columns.sort(key=lambda name: name != "title")
    if not columns:
        return ()
    with blame([items.path]):
        has_text = items.frame.select(_has_text(name, items.schema[name]) for name in columns).collect(engine="streaming").row(0)
    return tuple(name for name, found in zip(columns, has_text, strict=True) if found)


def _has_text(column: str, dtype: pl.DataType) -> pl.Expr:
    values = pl.col(column).list.join(" ", ignore_nulls=True) if dtype == pl.List(pl.String) else pl.col(column).cast(pl.String)
    return (values.str.strip_chars().str.len_bytes() > 0).any().alias(column)
