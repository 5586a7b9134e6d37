"""The 5-core files of 2014 as they were published (McAuley et al., SIGIR 2015).

``reviews_<Category>_5.json.gz`` has a JSON object a line (reviewerID, asin, unixReviewTime in seconds, ...);
``meta_<Category>.json.gz`` has a Python dict literal a line, for every product of the shop (asin, title, brand,
categories, ...). They are filtered already: nothing is filtered again.
"""

import ast
import dataclasses
import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from gbla_rec.config import PrepareConfig
from gbla_rec.data.input_files import open_file
from gbla_rec.data.item_text import text_columns
from gbla_rec.data.parquet_rows import write_parquet_rows
from gbla_rec.data.text_lines import read_lines

EVENTS = pa.schema({"user_id": pa.string(), "item_id": pa.string(), "timestamp": pa.int64()})
ITEMS = pa.schema({"item_id": pa.string(), "title": pa.string(), "brand": pa.string(), "categories": pa.list_(pa.string())})


def convert_reviews(config: PrepareConfig, directory: Path) -> PrepareConfig:
    """Write the reviews, and the text of the products that occur in them, as Parquet into ``directory``.

    Raises:
        ValueError: if a line cannot be read or lacks a value; the message names the file and the line.
    """
    asins: set[str] = set()
    write_parquet_rows(directory / "events.parquet", EVENTS, _events(config.events, asins))
    config = dataclasses.replace(config, events=directory / "events.parquet")
    if config.items is None or not config.items.name.startswith("meta_"):
        return config
    write_parquet_rows(directory / "items.parquet", ITEMS, _items(config.items, asins))
    texts = config.text_columns or text_columns(open_file(directory / "items.parquet"))
    return dataclasses.replace(config, items=directory / "items.parquet" if texts else None, text_columns=texts)


def _events(path: Path, asins: set[str]) -> Iterator[tuple[str, str, int]]:
    """Reviewer, product and time of each review in the order of the file; ``asins`` collects the products."""
    for number, line in read_lines(path):
        try:
            review = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a JSON object ({error})") from error
        user = _value(review, "reviewerID", str, path, number)
        item = _value(review, "asin", str, path, number)
        asins.add(item)
        yield user, item, _value(review, "unixReviewTime", int, path, number)


def _items(path: Path, asins: set[str]) -> Iterator[tuple[str, str | None, str | None, list[str]]]:
    """Text of the products in ``asins``; the others of the shop are not part of the catalogue."""
    lines: dict[str, int] = {}
    for number, line in read_lines(path):
        try:
            # a literal, never code: names and calls are refused
            product = ast.literal_eval(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a Python dict literal ({error})") from error
        asin = _value(product, "asin", str, path, number)
        if asin not in asins:
            continue
        first = lines.setdefault(asin, number)
        if first != number:
            raise ValueError(f"{path}, line {number}: product {asin!r} is described already in line {first}; keep one of them")
        yield asin, _text(product.get("title")), _text(product.get("brand")), _flat_texts(product.get("categories"))


def _value(record: Any, key: str, kind: type, path: Path, number: int) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool) or value == "":
        raise ValueError(f"{path}, line {number}: {key} must be {kind.__name__} and not empty, got {value!r}")
    return value


def _text(value: Any) -> str | None:
    return html.unescape(value).strip() or None if isinstance(value, str) else None


def _flat_texts(value: Any) -> list[str]:
    """Each name once, in order, of paths like ``[["Beauty", "Makeup"], ["Beauty", "Nails"]]``."""
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(text for part in value for text in _flat_texts(part)))
    text = _text(value)
    return [] if text is None else [text]
