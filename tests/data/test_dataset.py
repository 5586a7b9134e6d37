"""Opening and reading a prepared dataset: what it refuses, and what it finds."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.schema import SCHEMA_VERSION

PrepareFrame = Callable[..., PreparedDataset]
LOG = pl.DataFrame({"user_id": ["a", "b", "b", "ç"] * 3, "item_id": range(12), "timestamp": range(12), "action": ["x", None, "y", "x"] * 3})


@pytest.fixture
def dataset(prepare_frame: PrepareFrame) -> PreparedDataset:
    return prepare_frame(LOG, context_columns=("action",), max_events_per_shard=4)


def test_reopening_gives_the_same_manifest(dataset: PreparedDataset) -> None:
    assert PreparedDataset.open(dataset.path).manifest.to_json() == dataset.manifest.to_json()


def test_every_user_is_found(dataset: PreparedDataset) -> None:
    assert dataset.history("ç").items.tolist() == [3, 7, 11]
    assert dataset.history("b").user_row == 1
    assert dataset.history("b").context["action"].tolist() == [2, 1, 2, 1, 2, 1]


@pytest.mark.parametrize("user", ["c", 1])
def test_an_unknown_user_is_refused_with_ids_that_exist(dataset: PreparedDataset, user: str | int) -> None:
    with pytest.raises(ValueError, match=rf"^user_id \(--user\) must be a user of .*, .* type string, e\.g\. \['a'.*\], got {user!r}$"):
        dataset.history(user)


def test_only_named_context_columns_are_read(dataset: PreparedDataset) -> None:
    assert dataset.read_shard(0).context == {}
    assert list(dataset.read_shard(0, ["action"]).context) == ["action"]
    with pytest.raises(ValueError, match="'nothing' is not in"):
        dataset.read_shard(0, ["nothing"])


def test_a_directory_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gbla-rec prepare"):
        PreparedDataset.open(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema_version": SCHEMA_VERSION + 1}, "update the library"),
        ({"schema_version": 0}, "prepare the dataset again"),
        ({"schema_version": None}, "prepare the dataset again"),
        ({"surprise": 1}, "damaged"),
    ],
)
def test_other_versions_and_damaged_manifests_are_refused(dataset: PreparedDataset, change: dict[str, Any], match: str) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        PreparedDataset.open(dataset.path)


def test_a_manifest_cut_short_is_refused(dataset: PreparedDataset) -> None:
    path = dataset.path / "dataset.json"
    path.write_text(path.read_text()[:100])
    with pytest.raises(ValueError, match="damaged"):
        PreparedDataset.open(dataset.path)


@pytest.mark.parametrize("file", ["items.parquet", "context/action.parquet", "histories/part-00001.parquet"])
def test_a_missing_file_is_named(dataset: PreparedDataset, file: str) -> None:
    (dataset.path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        PreparedDataset.open(dataset.path)


def test_a_truncated_shard_is_named(dataset: PreparedDataset) -> None:
    path = dataset.path / "histories" / "part-00001.parquet"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ValueError, match="part-00001"):
        dataset.read_shard(1)


@pytest.mark.parametrize(
    ("file", "column", "value"),
    [
        ("items.parquet", "item_id", pl.lit(5, pl.Int64)),
        ("items.parquet", "num_train_events", pl.lit(5, pl.Int64)),
        ("context/action.parquet", "value", pl.lit("z")),
        ("histories/part-00000.parquet", "user_id", pl.lit("z")),
        ("histories/part-00000.parquet", "items", pl.col("items").list.reverse()),
        ("histories/part-00000.parquet", "timestamps", pl.col("timestamps").list.reverse()),
        ("histories/part-00000.parquet", "action", pl.col("action").list.eval(pl.element() + 1)),
        ("histories/part-00000.parquet", "test_begin", pl.col("test_begin") - 1),
    ],
)
def test_verify_sees_a_changed_value(dataset: PreparedDataset, file: str, column: str, value: pl.Expr) -> None:
    dataset.verify()
    changed = pl.read_parquet(dataset.path / file).with_columns(value.alias(column))
    changed.write_parquet(dataset.path / file)
    with pytest.raises(ValueError, match="the content has hash"):
        dataset.verify()


def test_a_dataset_can_be_moved_and_rewritten(dataset: PreparedDataset, tmp_path: Path) -> None:
    shutil.move(dataset.path, tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.parquet"):
        pl.read_parquet(path).write_parquet(path, compression="uncompressed", row_group_size=1)
    moved = PreparedDataset.open(tmp_path / "moved")
    moved.verify()
    assert moved.history("ç").items.tolist() == [3, 7, 11]
