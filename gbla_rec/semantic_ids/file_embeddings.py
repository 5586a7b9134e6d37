"""Item embeddings from the user's own file: ``.npy`` in item order, or Parquet with item ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from gbla_rec.data.dataset import PreparedDataset

NUM_NAMED = 5


@dataclass(frozen=True, slots=True)
class FileEmbedder:
    """Reads vectors from a file and proves that there is exactly one finite vector for each item.

    Attributes:
        file: ``.npy`` of shape ``(N, F)`` in item order (row ``i`` is item index ``i`` of ``items.parquet``), or Parquet with
            ``item_id`` and one column of lists. Parquet may hold further items; they are not read.
    """

    file: Path

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the rows or ids at fault if vectors are missing, duplicate, ragged or not finite.
        """
        if not self.file.is_file():
            raise FileNotFoundError(f"SemanticIdConfig.embedding_file: no such file: {self.file}")
        ids = dataset.items()["item_id"]
        if self.file.suffix == ".npy":
            vectors = self._read_npy(len(ids))
        elif self.file.suffix in (".parquet", ".pq"):
            vectors = self._read_parquet(ids)
        else:
            raise ValueError(f"SemanticIdConfig.embedding_file must end in .npy or .parquet, got {self.file}")
        # fp32: what the quantiser computes with, so that 1e39 is refused here and not there
        with np.errstate(over="ignore"):
            vectors = np.ascontiguousarray(vectors, dtype=np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            named = ", ".join(f"row {row} (item_id {ids[int(row)]!r})" for row in bad[:NUM_NAMED])
            raise ValueError(f"{self.file}: vectors must be finite in fp32, {len(bad)} are not (rows in item order): {named}")
        return vectors

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``; the vectors themselves stay in the user's file."""
        return {"file": self.file.name}

    def _read_npy(self, num_items: int) -> NDArray[Any]:
        try:
            vectors: NDArray[Any] = np.load(self.file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.file}: not a readable .npy array of numbers: {error}") from error
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or vectors.shape[0] != num_items or vectors.shape[1] == 0:
            raise ValueError(
                f"{self.file}: the array must have shape ({num_items}, F) and numbers, one row per item in the order of items.parquet; "
                f"got shape {vectors.shape} of {vectors.dtype}"
            )
        return vectors

    def _read_parquet(self, ids: pl.Series) -> NDArray[Any]:
        try:
            frame = pl.read_parquet(self.file)
        except PolarsError as error:
            raise ValueError(f"{self.file}: not a readable Parquet file: {error}") from error
        lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List | pl.Array)]
        if "item_id" not in frame.columns or len(lists) != 1:
            raise ValueError(f"{self.file}: needs a column item_id and exactly one column of lists of numbers, got {dict(frame.schema)}")
        if frame["item_id"].dtype.is_integer() != ids.dtype.is_integer():
            raise ValueError(f"{self.file}: item_id must be {ids.dtype} as in the dataset, got {frame['item_id'].dtype}")
        frame = frame.select(pl.col("item_id").cast(ids.dtype, strict=False), pl.col(lists[0]).alias("vector"))
        duplicates = frame.filter(pl.col("item_id").is_duplicated() & pl.col("item_id").is_not_null())["item_id"].unique().sort()
        if len(duplicates):
            named = duplicates.to_list()[:NUM_NAMED]
            raise ValueError(f"{self.file}: item_id must be unique, {len(duplicates)} occur more than once: {named}")
        joined = pl.DataFrame({"item_id": ids}).join(frame, on="item_id", how="left", maintain_order="left")
        missing = joined.filter(pl.col("vector").is_null())["item_id"]
        if len(missing):
            raise ValueError(f"{self.file}: every item needs a vector, {len(missing)} have none: item_id {missing.to_list()[:NUM_NAMED]}")
        return self._stack(joined)

    def _stack(self, joined: pl.DataFrame) -> NDArray[Any]:
        vector = joined["vector"]
        if isinstance(vector.dtype, pl.Array):
            vector = vector.arr.to_list()
        inner = vector.dtype.inner if isinstance(vector.dtype, pl.List) else None
        if inner is None or not inner.is_numeric():
            raise ValueError(f"{self.file}: the list column must hold numbers, got {vector.dtype}")
        lengths = vector.list.len()
        width = int(lengths[0])
        ragged = joined.filter((lengths != width) | (lengths == 0))["item_id"].to_list()
        if ragged:
            named = ragged[:NUM_NAMED]
            raise ValueError(f"{self.file}: all vectors must have one positive width ({width} in the first), not so item_id {named}")
        # a null inside a list becomes NaN, which embed() refuses by name
        flat = vector.explode().cast(pl.Float64).fill_null(float("nan")).to_numpy()
        return flat.reshape(len(joined), width)
