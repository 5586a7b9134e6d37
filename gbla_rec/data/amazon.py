"""Amazon reviews of 2014, 5-core, one category: the forms in which sequential recommenders use them.

Leave-one-out over each user's reviews in the order of time: the last item is the test target, the one before it the
validation target, as in S3-Rec (Zhou et al., CIKM 2020) and TIGER (Rajput et al., NeurIPS 2023).
"""

from pathlib import Path

import polars as pl

from gbla_rec.config import PrepareConfig, SplitConfig
from gbla_rec.data.column_kinds import is_text
from gbla_rec.data.input_files import InputFile, blame, open_file
from gbla_rec.data.published import PublishedDataset, dataset_name, require_path

SEQUENCES_NAME, ITEMS_NAME = "sequences.parquet", "items.parquet"
LEAVE_ONE_OUT = SplitConfig(kind="leave_last", num_targets=1, ties="ordered")
IDENTIFIERS = ("item_id", "asin")
"""String columns that are no text."""


def amazon_dataset(path: Path) -> PublishedDataset:
    """How to prepare the Amazon category at ``path``, by the files that lie there.

    Args:
        path: a directory with ``sequences.parquet`` (user_id; items, oldest first) and optionally ``items.parquet``
            (item_id and text columns; columns without any text are left out).

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if no form, or more than one, is recognised.
    """
    require_path(path)
    if (path / SEQUENCES_NAME).is_file():
        return _parquet_form(path)
    raise ValueError(f"--path: {path} holds no Amazon category; looked for {SEQUENCES_NAME}")


def _parquet_form(directory: Path) -> PublishedDataset:
    items = directory / ITEMS_NAME
    texts = text_columns(open_file(items)) if items.is_file() else ()
    config = PrepareConfig(
        name=dataset_name("amazon", directory.resolve().name),
        events=directory / SEQUENCES_NAME,
        items=items if texts else None,
        sequence_column="items",
        text_columns=texts,
        split=LEAVE_ONE_OUT,
    )
    return PublishedDataset(form="Parquet sequences", config=config)


def text_columns(items: InputFile) -> tuple[str, ...]:
    """Columns of an item table with text in at least one row, the title first; identifiers are no text."""
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
