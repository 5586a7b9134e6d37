"""What the values of a column mean: ids, times and categories, from any file format, without losing a digit.

A kind is decided over all files together. Ids are int64 if they are in every file, else strings: text in a CSV counts
as an integer only if every value is the plain decimal form of an int64, so ``007`` stays a string.
"""

from collections.abc import Iterable
from typing import Literal

import polars as pl

Kind = Literal["unknown", "bool", "int64", "float64", "string", "time"]
POLARS_TYPES: dict[Kind, pl.DataType] = {
    "unknown": pl.Int64(),
    "bool": pl.Boolean(),
    "int64": pl.Int64(),
    "float64": pl.Float64(),
    "string": pl.String(),
    "time": pl.Int64(),
}


def is_text(dtype: pl.DataType) -> bool:
    """Whether values of ``dtype`` are text (String, Categorical or Enum)."""
    return dtype in (pl.String, pl.Categorical, pl.Enum)


def is_int_text(column: pl.Expr) -> pl.Expr:
    """Whether text is the plain decimal form of an int64 (a missing value is not)."""
    return column.cast(pl.Int64, strict=False).cast(pl.String).eq(column).fill_null(False)


def _is_float_text(column: pl.Expr) -> pl.Expr:
    """Whether text is a number with a point or an exponent; digits alone beyond int64, and ``007.5``, are not."""
    is_number = column.cast(pl.Float64, strict=False).is_not_null()
    return (is_number & column.str.contains(r"[.eEnN]") & ~column.str.contains(r"^[+-]?0\d")).fill_null(False)


def text_counts(column: str) -> list[pl.Expr]:
    """Aggregates that ``kind_of_text`` needs: values, integers and numbers of a text column."""
    value = pl.col(column).cast(pl.String)
    return [
        value.count().alias(f"{column}:values"),
        is_int_text(value).sum().alias(f"{column}:integers"),
        (is_int_text(value) | _is_float_text(value)).sum().alias(f"{column}:numbers"),
    ]


def kind_of_text(counts: dict[str, int], column: str) -> Kind:
    """The narrowest kind that holds every value of a text column of a CSV file."""
    values = counts[f"{column}:values"]
    if values == 0:
        return "unknown"
    if counts[f"{column}:integers"] == values:
        return "int64"
    return "float64" if counts[f"{column}:numbers"] == values else "string"


def kind_of_time_text(counts: dict[str, int], column: str) -> Kind:
    """Integers or ISO-8601 text, whichever the majority is; the rest is an error to be found later."""
    values = counts[f"{column}:values"]
    if values == 0:
        return "unknown"
    return "int64" if 2 * counts[f"{column}:integers"] >= values else "time"


def kind_of_dtype(dtype: pl.DataType) -> Kind | None:
    """The kind of a typed column; ``None`` for a type that is not a single value."""
    if dtype == pl.Null:
        return "unknown"
    if dtype == pl.Boolean:
        return "bool"
    if dtype.is_integer():
        return "int64"
    if dtype in (pl.Date, pl.Datetime):
        return "time"
    if is_text(dtype):
        return "string"
    return "float64" if dtype.is_float() or dtype == pl.Decimal else None


def join_kinds(kinds: Iterable[Kind]) -> Kind:
    """The kind that holds the values of several files: equal kinds, or float64 for numbers, else string."""
    known = {kind for kind in kinds if kind != "unknown"}
    if len(known) <= 1:
        return known.pop() if known else "unknown"
    return "float64" if known == {"int64", "float64"} else "string"


def id_values(column: pl.Expr, kind: Kind) -> pl.Expr:
    """Ids as int64 or string; an integer outside int64 becomes null."""
    return column.cast(pl.String) if kind == "string" else column.cast(pl.Int64, strict=False)


def category_values(column: pl.Expr, kind: Kind) -> pl.Expr:
    """Categories as bool, int64, float64 (NaN is a missing value, -0.0 is 0.0) or string."""
    if kind == "float64":
        number = column.cast(pl.Float64, strict=False)
        return pl.when(number == 0.0).then(pl.lit(0.0)).otherwise(number).fill_nan(None)
    return column.cast(pl.String if kind == "time" else POLARS_TYPES[kind], strict=False)


def time_values(column: pl.Expr, kind: Kind, dtype: pl.DataType) -> pl.Expr:
    """Times as int64: integers as they are, dates and ISO-8601 text as microseconds since 1970 UTC; unparsable is null."""
    if dtype in (pl.Date, pl.Datetime):
        return column.cast(pl.Datetime("us")).cast(pl.Int64)
    if kind != "time":
        return column.cast(pl.Int64, strict=False)
    # one shape for all: a blank between date and time, Z as an offset
    text = column.cast(pl.String).str.strip_chars().str.replace("[Tt]", " ").str.replace("[Zz]$", "+00:00")
    local = [text.str.to_datetime(form, time_unit="us", strict=False) for form in ("%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")]
    offset = [
        text.str.to_datetime(form, time_unit="us", strict=False, time_zone="UTC").dt.replace_time_zone(None)
        for form in ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%d %H:%M%z")
    ]
    date = text.str.to_date("%Y-%m-%d", strict=False).cast(pl.Datetime("us"))
    return pl.coalesce(*local, *offset, date).cast(pl.Int64)
