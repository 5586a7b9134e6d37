"""The text form of S3-Rec and TIGER: ``<Category>.txt`` with a user and their items a line, oldest first.

``<Category>_item2attributes.json`` maps items to lists of attribute numbers; their names are not published.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from gbla_rec.config import PrepareConfig
from gbla_rec.data.parquet_rows import write_parquet_rows
from gbla_rec.data.text_lines import read_lines

ATTRIBUTE_WORD = "attribute{}"
"""A nameless attribute as one word, without a separator that would split it, so that items that share it share text."""
INT64 = range(-(1 << 63), 1 << 63)


@dataclass(slots=True)
class _Contents:
    """What a first pass finds: every user with their line, every item, and whether all ids are plain integers."""

    users: dict[str, int] = field(default_factory=dict)
    items: set[str] = field(default_factory=set)

    def types(self) -> tuple[pa.DataType, pa.DataType]:
        """Types of user and item ids: int64 if every id is the plain decimal form of one, else string."""
        user_type, item_type = (pa.int64() if all(map(is_plain_int64, ids)) else pa.string() for ids in (self.users, self.items))
        return user_type, item_type


def is_plain_int64(text: str) -> bool:
    """Whether ``text`` is the plain decimal form of an int64; ``007`` is not."""
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and len(digits) < 20 and str(number := int(text)) == text and number in INT64


def convert_text(config: PrepareConfig, directory: Path) -> PrepareConfig:
    """Write the sequences, and the attributes as text, as Parquet into ``directory``.

    Raises:
        ValueError: if a line has no items, a user has two lines, or the attributes are no JSON object of lists; the
            message names the file and the line.
    """
    contents = _check(config.events)
    user_type, item_type = contents.types()
    schema = pa.schema({config.user_column: user_type, config.sequence_column or "items": pa.list_(item_type)})
    write_parquet_rows(directory / "sequences.parquet", schema, _sequences(config.events, user_type, item_type))
    config = dataclasses.replace(config, events=directory / "sequences.parquet")
    if config.items is None or config.items.suffix != ".json":
        return config
    attributes = {item: words for item, words in _attributes(config.items).items() if item in contents.items and words}
    if not attributes:
        return dataclasses.replace(config, items=None)
    schema = pa.schema({config.item_column: item_type, "attributes": pa.list_(pa.string())})
    rows = ((int(item) if item_type == pa.int64() else item, words) for item, words in attributes.items())
    write_parquet_rows(directory / "items.parquet", schema, rows)
    return dataclasses.replace(config, items=directory / "items.parquet", text_columns=config.text_columns or ("attributes",))


def _check(path: Path) -> _Contents:
    contents = _Contents()
    for number, line in read_lines(path):
        user, *items = line.split()
        if not items:
            raise ValueError(f"{path}, line {number}: {line!r} is a user without items; a line is 'user item item ...'")
        first = contents.users.setdefault(user, number)
        if first != number:
            raise ValueError(f"{path}, line {number}: user {user!r} has a line already, {first}; each user is one line")
        contents.items.update(items)
    if not contents.users:
        raise ValueError(f"{path}: the file has no sequences; a line is 'user item item ...'")
    return contents


def _sequences(path: Path, user_type: pa.DataType, item_type: pa.DataType) -> Iterator[tuple[str | int, list[str] | list[int]]]:
    for _, line in read_lines(path):
        user, *items = line.split()
        yield int(user) if user_type == pa.int64() else user, list(map(int, items)) if item_type == pa.int64() else items


def _attributes(path: Path) -> dict[str, list[str]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not utf-8 text ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be a JSON object of items and their attributes, got {type(found).__name__}")
    for item, attributes in found.items():
        if not isinstance(attributes, list):
            raise ValueError(f"{path}: the attributes of item {item!r} must be a list, got {attributes!r}")
    return {item: [ATTRIBUTE_WORD.format(attribute) for attribute in attributes] for item, attributes in found.items()}
