"""The next items of every user of a dataset, as one Parquet file."""

# U users, R results per user (docs/shapes.md)

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
from numpy.typing import NDArray

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import TEMPORARY_PREFIX
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.input_files import PARQUET_SUFFIXES
from gbla_rec.evaluation.rank import Search, search_batch, users_at_once
from gbla_rec.evaluation.recommend import Recommender


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Rankings ``(U, R)`` of some users, -1 where fewer exist, and their scores."""

    user_rows: NDArray[np.int64]
    items: NDArray[np.int64]
    scores: NDArray[np.float32]

    def __getitem__(self, which: NDArray[np.int64] | NDArray[np.bool_]) -> "_Ranked":
        return _Ranked(self.user_rows[which], self.items[which], self.scores[which])

    @classmethod
    def of(cls, parts: list["_Ranked"]) -> "_Ranked":
        """All of them."""
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("user_rows", "items", "scores")))


def recommend_to_all(
    recommender: Recommender,
    output: Path,
    count: int,
    *,
    exclude_history: bool = True,
    said: Callable[[int], None] = lambda num_users: None,
) -> int:
    """Write the next ``count`` items of every user after all of their events; all ranks call it together.

    The file has one row a user, in the order of the dataset whatever the number of ranks: ``user_id`` as in the event log, ``item_ids``,
    best first (fewer than ``count`` where a catalogue has no more), and their ``scores``. It appears whole or not at all.

    Args:
        recommender: the run.
        output: the Parquet file, of a name that ends in .parquet or .pq.
        count: items of a user.
        exclude_history: leave out the items of the own history.
        said: called by the first rank with the users written so far, after each shard of the dataset.

    Returns:
        The number of users.

    Raises:
        ValueError: if ``output`` has the name of another format.
        FileExistsError: if ``output`` exists.
        OSError: if it cannot be written.
    """
    require_parquet_name(output)
    parts = recommender.parts
    search = Search(max(parts.config.evaluation.num_beams, count), exclude_history, recommender.score)
    parts.model.eval()
    batches = parts.evaluation_batches(
        "next",
        parts.config.evaluation.tokens_per_batch,
        users_per_batch=users_at_once(parts.config, [search]),
        with_queries=False,
    )
    with _new_file(output) as temporary:
        users = _UsersInOrder(parts.dataset, recommender.items["item_id"], temporary)
        for histories, batch in batches:
            found: list[_Ranked] = []
            # every rank encodes, empty batch or not: the sharded tables need all ranks
            with parts.autocast():
                encoded = parts.retriever.encode(batch)
                if len(histories.user_rows):
                    result = search_batch(parts, recommender.trie, histories, encoded, recommender.vectors, search, count)
                    best = result[recommender.score]
                    found = [_Ranked(histories.user_rows, best.items.cpu().numpy(), best.scores.float().cpu().numpy())]
            gathered: list[list[_Ranked]] = [[] for _ in range(dist.get_world_size())]
            dist.all_gather_object(gathered, found)
            if on_first_rank(partial(users.add, [part for rank in gathered for part in rank])) and dist.get_rank() == 0:
                said(users.num_users)
        return on_first_rank(users.close)


def require_parquet_name(output: Path) -> None:
    """Raise ValueError unless ``output`` is named as Parquet: readers choose the format by the name."""
    if output.suffix.lower() not in PARQUET_SUFFIXES:
        raise ValueError(
            f"output (--all-users) must end in one of {PARQUET_SUFFIXES}, the format that is written, got {str(output)!r}; "
            "name it as next_items.parquet"
        )


@contextmanager
def _new_file(output: Path) -> Iterator[Path]:
    """Yield a temporary name beside ``output``; the first rank renames it at the end, or deletes it on any exception."""
    temporary = output.with_name(f"{TEMPORARY_PREFIX}{output.name}")

    def begin() -> None:
        if output.exists() or output.is_symlink():
            raise FileExistsError(f"output (--all-users): {output} exists; delete it or choose another name")
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)

    on_first_rank(begin)
    try:
        yield temporary
        on_first_rank(lambda: temporary.rename(output))
    except BaseException:
        if dist.get_rank() == 0:
            temporary.unlink(missing_ok=True)
        raise


class _UsersInOrder:
    """Holds rankings until all users of a shard are there, and writes them as one row group; of the first rank."""

    def __init__(self, dataset: PreparedDataset, item_ids: pl.Series, path: Path) -> None:
        self.dataset, self.item_ids, self.path = dataset, item_ids, path
        self.num_users, self.shard = 0, -1
        self.held: list[_Ranked] = []
        self.first = self.end = self.wanted = 0
        self._next_shard()
        self.writer: pq.ParquetWriter | None = None

    def add(self, ranked: list[_Ranked]) -> bool:
        """Keep these; whether a shard was finished and written."""
        self.held += ranked
        written = self.num_users
        while self.shard < self.dataset.num_shards and sum(len(part.user_rows) for part in self.held) >= self.wanted:
            if self.wanted:
                held = _Ranked.of(self.held)
                is_here = (held.user_rows >= self.first) & (held.user_rows < self.end)
                if int(is_here.sum()) < self.wanted:
                    break
                here, self.held = held[is_here], [held[~is_here]]
                self._write(here[np.argsort(here.user_rows)])
            self._next_shard()
        return self.num_users > written

    def _next_shard(self) -> None:
        self.shard += 1
        if self.shard < self.dataset.num_shards:
            num_events = self.dataset.read_lengths(self.shard)[2]
            self.first = self.dataset.first_user(self.shard)
            self.end, self.wanted = self.first + len(num_events), int(np.count_nonzero(num_events))

    def _write(self, ranked: _Ranked) -> None:
        is_item = ranked.items >= 0
        offsets = pa.array(np.concatenate([[0], np.cumsum(is_item.sum(axis=1))]), pa.int64())
        user_ids = self.dataset.user_ids(self.shard).gather(ranked.user_rows - self.first)
        lists = {"item_ids": self.item_ids.gather(ranked.items[is_item]).to_arrow(), "scores": pa.array(ranked.scores[is_item])}
        columns = {name: pa.LargeListArray.from_arrays(offsets, values) for name, values in lists.items()}
        table = pa.table({"user_id": user_ids.to_arrow(), **columns})
        with self._named():
            if self.writer is None:
                self.writer = pq.ParquetWriter(self.path, table.schema)
            self.writer.write_table(table)
        self.num_users += len(table)

    def close(self) -> int:
        """End the file; the number of its users."""
        assert self.writer is not None and self.shard == self.dataset.num_shards
        with self._named():
            self.writer.close()
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        return self.num_users

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Names the file in an error of writing it, which may not say where."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno or errno.EIO, f"recommendations could not be written: {error}", str(self.path)) from error
