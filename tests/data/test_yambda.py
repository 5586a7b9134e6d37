"""Files of Yambda's published schema prepare to what its benchmark's split says, flat and sequential alike."""

import dataclasses
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gbla_rec.config import SplitConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare
from gbla_rec.data.yambda import yambda_dataset

# the constants of the published benchmark, in seconds
TRAIN_END, VALIDATION_BEGIN, VALIDATION_END, TEST_BEGIN = 25_823_600, 25_825_400, 25_911_800, 25_913_600
SCHEMA = {"uid": pl.UInt32, "timestamp": pl.UInt32, "item_id": pl.UInt32, "is_organic": pl.UInt8}
LISTENS = SCHEMA | {"played_ratio_pct": pl.UInt16, "track_length_seconds": pl.UInt32}
TYPES = pl.Enum(["listen", "like", "dislike", "unlike", "undislike"])
MULTI_EVENT = LISTENS | {"event_type": TYPES}
# sorted by user and time, as published; both sides of every border; two events of one time that are not sorted by item
EVENTS: list[tuple[Any, ...]] = [
    (10, 0, 3, 1, 100, 180, "listen"),
    (10, 100, 9, 0, 50, 200, "listen"),
    (10, 100, 4, 1, 159, 95, "listen"),
    (10, TRAIN_END - 5, 2**32 - 1, 1, 49, 180, "listen"),
    (10, TRAIN_END, 5, 1, 90, 180, "listen"),
    (10, VALIDATION_BEGIN - 5, 5, 1, 90, 180, "listen"),
    (10, VALIDATION_BEGIN, 3, 0, 90, 180, "listen"),
    (10, VALIDATION_END - 5, 7, 0, None, None, "like"),
    (10, VALIDATION_END, 8, 1, 90, 180, "listen"),
    (10, TEST_BEGIN - 5, 8, 1, 90, 180, "listen"),
    (10, TEST_BEGIN, 9, 1, 90, 180, "listen"),
    (20, 5, 3, 1, 0, 180, "listen"),
    (2**32 - 1, TEST_BEGIN, 3, 1, 77, 180, "listen"),
]


def write_events(directory: Path, name: str, schema: dict[str, Any], events: list[tuple[Any, ...]], form: str) -> Path:
    frame = pl.DataFrame([event[: len(schema)] for event in events], schema=schema, orient="row")
    if form != "flat":
        frame = frame.group_by("uid", maintain_order=True).all()
    if form == "sequential of the card":
        frame = frame.rename({"item_id": "item_ids", "timestamp": "timestamps"})
    directory.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(directory / name)
    return directory


def prepare_path(path: Path, output: Path, **changes: Any) -> PreparedDataset:
    found = yambda_dataset(path)
    return prepare(dataclasses.replace(found.config, **changes), output, found.convert)


def events_by_part(dataset: PreparedDataset) -> dict[int, list[list[int]]]:
    """Items of each user: training, validation, test."""
    items, found = dataset.items()["item_id"].to_list(), {}
    for shard in dataset.iterate_shards([]):
        for row, user in enumerate(shard.user_ids):
            history = [items[item] for item in shard.items[shard.offsets[row] : shard.offsets[row + 1]]]
            validation, test = int(shard.validation_begin[row]), int(shard.test_begin[row])
            found[user] = [history[:validation], history[validation:test], history[test:]]
    return found


@pytest.mark.parametrize("form", ["flat", "sequential", "sequential of the card"])
def test_listens_are_listen_plus_under_the_published_split(tmp_path: Path, form: str) -> None:
    listens = [event for event in EVENTS if event[-1] == "listen"]
    dataset = prepare_path(write_events(tmp_path / "50m", "listens.parquet", LISTENS, listens, form), tmp_path / "out")
    assert events_by_part(dataset) == {10: [[3, 9, 4], [3], [9]], 2**32 - 1: [[], [], [3]]}
    manifest = dataset.manifest
    assert (manifest.name, [info.name for info in manifest.context]) == ("yambda_50m_listens", ["is_organic"])
    assert (manifest.split.validation_time, manifest.split.test_time) == (VALIDATION_BEGIN, TEST_BEGIN)
    # a user without a memory cannot be evaluated
    assert (manifest.num_validation_users, manifest.num_test_users, manifest.has_timestamps) == (1, 1, True)


@pytest.mark.parametrize("form", ["sequential", "sequential of the card"])
def test_sequential_files_equal_flat_files(tmp_path: Path, form: str) -> None:
    forms = {name: write_events(tmp_path / name, "multi_event.parquet", MULTI_EVENT, EVENTS, name) for name in ("flat", form)}
    flat, sequential = (prepare_path(path, tmp_path / f"out {name}", max_events_per_shard=5) for name, path in forms.items())
    assert flat.manifest.content_hash == sequential.manifest.content_hash
    assert flat.context_values("event_type").to_list() == ["like", "listen"]
    assert events_by_part(flat)[10] == [[3, 9, 4, 2**32 - 1], [3, 7], [9]]


def test_another_split_moves_the_gaps_and_one_by_user_has_none(tmp_path: Path) -> None:
    times = [(10, time, item, 1) for item, time in enumerate([0, 3199, 3200, 4999, 5000, 6000, 8000, 9999, 10_000])]
    path = write_events(tmp_path / "50m", "likes.parquet", SCHEMA, times, "flat")
    split = SplitConfig(kind="temporal", validation_time=5_000, test_time=10_000)
    assert events_by_part(prepare_path(path, tmp_path / "moved", split=split)) == {10: [[0, 1], [4, 5, 6], [8]]}
    split = dataclasses.replace(split, kind="leave_last")
    assert events_by_part(prepare_path(path, tmp_path / "by user", split=split)) == {10: [[0, 1, 2, 3, 4, 5, 6], [7], [8]]}


def test_several_files_or_another_schema_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds none of multi_event.parquet, listens.parquet, .*, but nothing"):
        yambda_dataset(tmp_path)
    write_events(tmp_path, "likes.parquet", {name: dtype for name, dtype in SCHEMA.items() if name != "is_organic"}, EVENTS, "flat")
    with pytest.raises(ValueError, match=r"likes.parquet: Yambda column 'is_organic' is missing.*not in the published form; .*--events"):
        yambda_dataset(tmp_path)
    write_events(tmp_path, "listens.parquet", LISTENS, EVENTS, "flat")
    with pytest.raises(ValueError, match=r"more than one log: likes.parquet, listens.parquet; give the file itself"):
        yambda_dataset(tmp_path)
    assert yambda_dataset(tmp_path / "listens.parquet").config.name == "yambda_listens"


def test_lists_of_different_lengths_are_refused(tmp_path: Path) -> None:
    frame = pl.DataFrame({"uid": [1], "item_id": [[1, 2]], "timestamp": [[5]], "is_organic": [[1, 0]]})
    frame.write_parquet(tmp_path / "likes.parquet")
    with pytest.raises(ValueError, match=r"likes.parquet"):
        prepare_path(tmp_path, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["likes.parquet"]
