"""Amazon reviews of 2014, 5-core, one category: the forms in which sequential recommenders use them.

Leave-one-out over each user's reviews in the order of time, reviews of one second in the order of the file: the last
item is the test target, the one before it the validation target, as in S3-Rec (Zhou et al., CIKM 2020) and TIGER
(Rajput et al., NeurIPS 2023).
"""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import polars as pl

from gbla_rec.config import PrepareConfig, SplitConfig
from gbla_rec.data.amazon_reviews import convert_reviews
from gbla_rec.data.amazon_text import ATTRIBUTE_WORD, convert_text
from gbla_rec.data.input_files import InputFile, blame, open_file
from gbla_rec.data.item_text import text_columns
from gbla_rec.data.published import PublishedDataset, dataset_name, files_like, the_only_file

DESCRIPTIONS = ("title", "short_text", "keywords")
"""Columns that describe an item, the best first: one of them is taken."""
LEAVE_ONE_OUT = SplitConfig(kind="leave_last", num_targets=1, ties="ordered")
SEQUENCES_NAME, ITEMS_NAME = "sequences.parquet", "items.parquet"
REVIEWS = re.compile(r"reviews_(?P<category>.+)_5\.json(?P<gz>\.gz)?")
# S3-Rec puts its negative samples beside the sequences
TEXT = re.compile(r"(?!(?i:readme|licen[cs]e|terms))(?P<category>.+)(?<!_sample)\.txt")


def amazon_dataset(path: Path) -> PublishedDataset:
    """How to prepare the Amazon category at ``path``, by the files that lie there.

    * ``sequences.parquet`` (user_id; items, oldest first) and optionally ``items.parquet`` (item_id and text columns);
    * ``<Category>.txt`` (a line: user item item ...) and optionally ``<Category>_item2attributes.json``;
    * ``reviews_<Category>_5.json.gz`` and optionally ``meta_<Category>.json.gz``.

    Columns without any text are left out, and a category may have none; of title, short_text and keywords the first with text is taken.

    Args:
        path: the directory, or the first file of a form where several categories or forms lie together.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if no form, or more than one, is recognised.
    """
    forms: dict[str, Callable[[Path], PublishedDataset]] = {SEQUENCES_NAME: _parquet_form}
    forms |= {"<Category>.txt": _text_form, "reviews_<Category>_5.json.gz": _reviews_form}
    patterns = (re.compile(re.escape(SEQUENCES_NAME)), TEXT, REVIEWS)
    found = {file: form for pattern, form in zip(patterns, forms.values(), strict=True) for file in files_like(path, pattern)}
    file = the_only_file(path, found, forms)
    return found[file](file)


def _parquet_form(sequences: Path) -> PublishedDataset:
    items = sequences.with_name(ITEMS_NAME)
    texts, is_nameless = _parquet_texts(open_file(items)) if items.is_file() else ((), False)
    config = PrepareConfig(
        name=dataset_name("amazon", sequences.resolve().parent.name),
        events=sequences,
        items=items if texts else None,
        sequence_column="items",
        text_columns=texts,
        split=LEAVE_ONE_OUT,
    )
    return PublishedDataset(form="Parquet sequences", config=config, convert=_name_attributes if is_nameless else None)


def _parquet_texts(items: InputFile) -> tuple[tuple[str, ...], bool]:
    """The text columns, and whether ``attributes`` is one that must be made of ``attribute_ids``, since nothing names them."""
    texts = text_columns(items)
    # a shortened text and keywords of unknown making say nothing that the title does not
    spare = [name for name in DESCRIPTIONS if name in texts][1:]
    texts = tuple(name for name in texts if name not in spare)
    ids = items.schema.get("attribute_ids")
    if "attributes" in texts or not isinstance(ids, pl.List) or not ids.inner.is_integer():
        return texts, False
    with blame([items.path]):
        has_ids = items.frame.select((pl.col("attribute_ids").list.len() > 0).any()).collect(engine="streaming").item()
    return ((*texts, "attributes"), True) if has_ids else (texts, False)


def _name_attributes(config: PrepareConfig, directory: Path) -> PrepareConfig:
    """Write the item table with words for its nameless attributes."""
    if config.items is None:
        return config
    words = pl.col("attribute_ids").list.eval(pl.format(ATTRIBUTE_WORD, pl.element())).alias("attributes")
    with blame([config.items]):
        pl.scan_parquet(config.items, glob=False).with_columns(words).sink_parquet(directory / ITEMS_NAME)
    return dataclasses.replace(config, items=directory / ITEMS_NAME)


def _text_form(file: Path) -> PublishedDataset:
    attributes = file.with_name(f"{file.stem}_item2attributes.json")
    config = PrepareConfig(
        name=dataset_name("amazon", file.stem),
        events=file,
        items=attributes if attributes.is_file() else None,
        sequence_column="items",
        split=LEAVE_ONE_OUT,
    )
    return PublishedDataset(form="S3-Rec text", config=config, convert=convert_text)


def _reviews_form(file: Path) -> PublishedDataset:
    match = REVIEWS.fullmatch(file.name)
    assert match is not None
    metas = (file.with_name(f"meta_{match['category']}.json{suffix}") for suffix in (".gz", ""))
    config = PrepareConfig(
        name=dataset_name("amazon", match["category"]),
        events=file,
        items=next((meta for meta in metas if meta.is_file()), None),
        split=LEAVE_ONE_OUT,
    )
    return PublishedDataset(form="5-core reviews", config=config, convert=convert_reviews)
