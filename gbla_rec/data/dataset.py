"""Open a prepared dataset and read its items, shards and single histories."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from gbla_rec.data.content_hash import ContentHash
from gbla_rec.data.schema import ITEMS_NAME, DatasetManifest, context_path, read_manifest
from gbla_rec.data.shard_files import HistoryShard as HistoryShard
from gbla_rec.data.shard_files import read_lengths, read_shard

NUM_EXAMPLE_IDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class History:
    """The whole history of one user, oldest event first; shapes as in ``HistoryShard`` with one user."""

    user_id: int | str
    user_row: int
    items: NDArray[np.int64]
    timestamps: NDArray[np.int64] | None
    context: dict[str, NDArray[np.int32]]
    validation_begin: int
    test_begin: int


class PreparedDataset:
    """A prepared dataset on disk; nothing but the manifest is held in memory."""

    def __init__(self, path: Path, manifest: DatasetManifest) -> None:
        """Use ``PreparedDataset.open``."""
        self.path = path
        self.manifest = manifest
        sizes = [shard.num_users for shard in manifest.shards]
        self._first_users = list(itertools.accumulate(sizes, initial=0))

    @classmethod
    def open(cls, path: Path) -> "PreparedDataset":
        """Open the prepared dataset in the directory ``path``.

        Raises:
            FileNotFoundError: if ``path`` is not a prepared dataset or one of its files is missing.
            ValueError: if the manifest is damaged or of another version.
        """
        manifest = read_manifest(path)
        files = [ITEMS_NAME, *(context_path(info.name) for info in manifest.context), *(shard.path for shard in manifest.shards)]
        for file in files:
            if not (path / file).is_file():
                raise FileNotFoundError(f"{path / file} is missing; the prepared dataset is incomplete, prepare it again")
        return cls(path, manifest)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.manifest.shards)

    def items(self) -> pl.DataFrame:
        """All items in index order: ``item_index``, ``item_id``, ``num_train_events`` and the text columns."""
        return _read_table(self.path / ITEMS_NAME)

    def train_counts(self) -> NDArray[np.int64]:
        """``(N,)`` int64: training events of each item."""
        return _read_table(self.path / ITEMS_NAME, ["num_train_events"]).to_series().to_numpy().copy()

    def context_sizes(self) -> dict[str, int]:
        """Number of values of each context column."""
        return {info.name: info.num_values for info in self.manifest.context}

    def context_values(self, name: str) -> pl.Series:
        """The values of a context column by code; a missing value, if there is one, is the last."""
        self._check_context([name])
        return _read_table(self.path / context_path(name))["value"]

    def first_user(self, index: int) -> int:
        """Global row of the first user of shard ``index``."""
        return self._first_users[index]

    def read_shard(self, index: int, context: Sequence[str] = ()) -> HistoryShard:
        """Read shard ``index`` with the named context columns.

        Raises:
            ValueError: if a context column is unknown or the file is damaged.
            IndexError: if there is no such shard.
        """
        self._check_context(context)
        path = self.path / self.manifest.shards[index].path
        return read_shard(path, self._first_users[index], context, has_timestamps=self.manifest.has_timestamps)

    def read_lengths(self, index: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """``validation_begin``, ``test_begin`` and ``num_events`` of the users of shard ``index``, each ``(U,)`` int64."""
        return read_lengths(self.path / self.manifest.shards[index].path)

    def user_ids(self, index: int) -> pl.Series:
        """The ids of the users of shard ``index``, in their order."""
        return pl.read_parquet(self.path / self.manifest.shards[index].path, columns=["user_id"], glob=False)["user_id"]

    def history(self, user_id: int | str) -> History:
        """The history of one user, with all context columns.

        Raises:
            ValueError: if the user is unknown; the message names ids that exist.
        """
        for index, info in enumerate(self.manifest.shards):
            frame = pl.scan_parquet(self.path / info.path, row_index_name="row", glob=False, hive_partitioning=False)
            if not _is_id_type(user_id, self.manifest.user_id_type):
                break
            found = frame.filter(pl.col("user_id") == user_id).collect(engine="streaming")
            if len(found):
                return self._history(found, self._first_users[index])
        raise ValueError(
            f"user_id (--user) must be a user of {self.path}, whose user ids are of type {self.manifest.user_id_type}, e.g. "
            f"{self._example_ids()}, got {user_id!r}"
        )

    def iterate_shards(self, context: Sequence[str] = ()) -> Iterator[HistoryShard]:
        """All shards in order, one in memory at a time."""
        for index in range(self.num_shards):
            yield self.read_shard(index, context)

    def verify(self) -> None:
        """Recompute the content hash from the files.

        Raises:
            ValueError: if it differs from the manifest's.
        """
        content = ContentHash()
        names = [info.name for info in self.manifest.context]
        for shard in self.iterate_shards(names):
            shard.add_to(content)
        add_items(content, self.items())
        for name in names:
            content.add_series(f"context/{name}", self.context_values(name))
        found = content.hexdigest()
        if found != self.manifest.content_hash:
            raise ValueError(f"{self.path}: the content has hash {found}, the manifest says {self.manifest.content_hash}; prepare it again")

    def _history(self, frame: pl.DataFrame, first_user: int) -> History:
        def values(name: str) -> NDArray[np.int64]:
            return frame[name].explode().to_numpy().copy()

        return History(
            user_id=frame["user_id"][0],
            user_row=first_user + int(frame["row"][0]),
            items=values("items"),
            timestamps=values("timestamps") if self.manifest.has_timestamps else None,
            context={info.name: values(info.name).astype(np.int32) for info in self.manifest.context},
            validation_begin=int(frame["validation_begin"][0]),
            test_begin=int(frame["test_begin"][0]),
        )

    def _example_ids(self) -> list[int | str]:
        frame = pl.scan_parquet(self.path / self.manifest.shards[0].path, glob=False).select("user_id").head(NUM_EXAMPLE_IDS)
        return frame.collect().to_series().to_list()

    def _check_context(self, names: Sequence[str]) -> None:
        known = self.context_sizes()
        for name in names:
            if name not in known:
                raise ValueError(f"context column {name!r} is not in {self.path}, which has {sorted(known)}")


def add_items(content: ContentHash, items: pl.DataFrame) -> None:
    """Append the items table to a hash."""
    for column in items.columns:
        content.add_series(f"items/{column}", items[column])


def _read_table(path: Path, columns: list[str] | None = None) -> pl.DataFrame:
    try:
        return pl.read_parquet(path, columns=columns, glob=False, hive_partitioning=False)
    except (PolarsError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); prepare the dataset again") from error


def _is_id_type(user_id: int | str, kind: str) -> bool:
    return isinstance(user_id, str) if kind == "string" else isinstance(user_id, int) and -(1 << 63) <= user_id < 1 << 63
