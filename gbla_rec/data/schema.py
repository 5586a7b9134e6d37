"""What a prepared dataset looks like on disk: names, versions and the manifest ``dataset.json``.

::

    dataset.json                     DatasetManifest
    items.parquet                    item_index, item_id, num_train_events, text columns; sorted by item_id
    context/<name>.parquet           code, value; sorted by value, a missing value last
    histories/part-00000.parquet     one row a user, sorted by user_id; see HISTORY_COLUMNS
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEMA_VERSION = 1
MANIFEST_NAME = "dataset.json"
ITEMS_NAME = "items.parquet"
CONTEXT_DIR = "context"
HISTORIES_DIR = "histories"
HISTORY_COLUMNS = ("user_id", "items", "timestamps", "validation_begin", "test_begin", "num_events")
"""Columns of a part beside the context columns; ``timestamps`` is absent for sequences without times."""
ITEM_COLUMNS = ("item_index", "item_id", "num_train_events")
IdType = Literal["int64", "string"]


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One file of histories; ``path`` is relative to the dataset."""

    path: str
    num_users: int
    num_events: int


@dataclass(frozen=True, slots=True)
class ContextInfo:
    """A categorical context column; codes are ``0 .. num_values - 1``."""

    name: str
    num_values: int


@dataclass(frozen=True, slots=True)
class SplitInfo:
    """The split that was applied, with the times that a temporal split resolved to."""

    kind: str
    ties: str
    num_targets: int
    validation_time: int | None
    test_time: int | None


@dataclass(frozen=True, slots=True)
class DatasetManifest:
    """The content of ``dataset.json``.

    ``num_validation_users`` and ``num_test_users`` count the users that can be evaluated: a non-empty memory and at
    least one target. ``content_hash`` covers the content, not the files: it is the same for another shard size.
    """

    schema_version: int
    name: str
    num_users: int
    num_items: int
    num_events: int
    has_timestamps: bool
    user_id_type: IdType
    item_id_type: IdType
    split: SplitInfo
    context: tuple[ContextInfo, ...]
    text_columns: tuple[str, ...]
    length_quantiles: dict[str, float]
    num_validation_users: int
    num_test_users: int
    content_hash: str
    shards: tuple[ShardInfo, ...]
    source: dict[str, Any]

    def to_json(self) -> str:
        """The manifest as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2, default=str, ensure_ascii=False) + "\n"


def shard_path(index: int) -> str:
    """Relative path of the shard with number ``index``."""
    return f"{HISTORIES_DIR}/part-{index:05d}.parquet"


def context_path(name: str) -> str:
    """Relative path of the vocabulary of the context column ``name``."""
    return f"{CONTEXT_DIR}/{name}.parquet"


def read_manifest(directory: Path) -> DatasetManifest:
    """Read ``dataset.json`` of a prepared dataset.

    Raises:
        FileNotFoundError: if the directory is not a prepared dataset.
        ValueError: if the manifest is damaged or written by a newer version of the library.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        prepared = sorted(found.parent.name for found in directory.parent.glob(f"*/{MANIFEST_NAME}"))
        raise FileNotFoundError(
            f"{directory} is not a prepared dataset (no {MANIFEST_NAME}); make it with: gbla-rec prepare --name {directory.name} "
            f"--events FILE (or --recipe {directory.name} if its log comes with the repository, or public data: --dataset and --path); "
            f"datasets beside it (--dataset NAME): {', '.join(prepared) or 'none'}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["schema_version"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); prepare the dataset again") from error
    if version != SCHEMA_VERSION:
        cure = "update the library" if isinstance(version, int) and version > SCHEMA_VERSION else "prepare the dataset again"
        raise ValueError(f"{path} has schema_version {version!r}, this library reads {SCHEMA_VERSION}: {cure}")
    try:
        return DatasetManifest(
            **{
                **raw,
                "split": SplitInfo(**raw["split"]),
                "context": tuple(ContextInfo(**info) for info in raw["context"]),
                "text_columns": tuple(raw["text_columns"]),
                "shards": tuple(ShardInfo(**info) for info in raw["shards"]),
            }
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); prepare the dataset again") from error
