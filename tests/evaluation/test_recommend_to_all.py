"""The file of all users: rows in the order of the dataset, whatever the order of the batches; errors name the file."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.evaluation import recommend_to_all as module
from gbla_rec.evaluation.recommend_to_all import _Ranked, _UsersInOrder, recommend_to_all

SHARDS = ([3, 0, 1], [0, 0], [2], [], [5, 5, 1, 0])
"""Events of the users of each shard."""
FIRST = np.cumsum([0, *map(len, SHARDS)]).tolist()
EVENTS = [events for shard in SHARDS for events in shard]
ITEM_IDS = pl.Series([2**40 + item for item in range(9)])


def dataset() -> Any:
    return SimpleNamespace(
        num_shards=len(SHARDS),
        read_lengths=lambda shard: (None, None, np.array(SHARDS[shard], np.int64)),
        first_user=lambda shard: FIRST[shard],
        user_ids=lambda shard: pl.Series([f"u{FIRST[shard] + row}" for row in range(len(SHARDS[shard]))], dtype=pl.String),
    )


def ranked(rows: list[int]) -> _Ranked:
    """``row % 3`` items of each user."""
    items = [[(row + place) % 9 if place < row % 3 else -1 for place in range(2)] for row in rows]
    return _Ranked(np.array(rows), np.array(items), np.array([[row, row + 0.5] for row in rows], np.float32))


@given(data=st.data(), rows=st.permutations([row for row, events in enumerate(EVENTS) if events]))
def test_users_come_in_order_however_they_arrive(data: st.DataObject, rows: list[int], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("file") / "items.parquet"
    users = _UsersInOrder(dataset(), ITEM_IDS, path)
    while rows:
        size = data.draw(st.integers(1, len(rows)))
        users.add([ranked(rows[:size])])
        rows = rows[size:]
    kept = [row for row, events in enumerate(EVENTS) if events]
    assert users.close() == len(kept)
    found = pl.read_parquet(path)
    assert found["user_id"].to_list() == [f"u{row}" for row in kept]
    assert found["item_ids"].to_list() == [[2**40 + (row + place) % 9 for place in range(row % 3)] for row in kept]
    assert found["scores"].to_list() == [[row + 0.5 * place for place in range(row % 3)] for row in kept]


@pytest.mark.parametrize("name", ["next.csv", "next"])
def test_a_name_of_another_format_is_refused_before_any_work(name: str, tmp_path: Path) -> None:
    recommender: Any = None
    with pytest.raises(ValueError, match=rf"output \(--all-users\) must end in one of .*, got '.*{name}'; name it as"):
        recommend_to_all(recommender, tmp_path / name, 5)


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, table: object) -> None:
        # as Arrow says it: without a name
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.pq.ParquetWriter, "write_table", full)
    users = _UsersInOrder(dataset(), ITEM_IDS, tmp_path / "items.parquet")
    with pytest.raises(OSError, match=r"recommendations could not be written: .*No space left on device.*items\.parquet") as raised:
        users.add([ranked([0, 2])])
    assert raised.value.errno == errno.ENOSPC
