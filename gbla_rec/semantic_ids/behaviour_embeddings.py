"""Item embeddings from behaviour: items that stand near each other in training histories get near vectors.

Truncated SVD of the positive pointwise mutual information of co-occurrence, which is what skip-gram factorises
(Levy and Goldberg, 2014), with skip-gram's smoothing of the context distribution. Only training events are read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.stream import iterate_train_items
from gbla_rec.semantic_ids.reduction import fit_directions, project

WINDOW = 10
CONTEXT_SMOOTHING = 0.75
BASIS_FILE = "embedding_basis.parquet"
DIRECTIONS_FILE = "embedding_context_directions.npy"
OLDER_DIRECTIONS_FILE = "embedding_directions.npy"
"""In IDs of version 0.1 without item features; text embedders write a file of this name."""


@dataclass(frozen=True, eq=False)
class BehaviourEmbedder:
    """PPMI against the items known when it was fitted, projected on the singular vectors found then.

    Attributes:
        basis_ids: the ``X`` items that are contexts, int64 or string.
        context_probabilities: ``(X,)`` fp64, smoothed; 0 for an item never seen beside another.
        directions: ``(F, X)`` fp32.
    """

    basis_ids: pl.Series
    context_probabilities: NDArray[np.float64]
    directions: NDArray[np.float32]

    @classmethod
    def fit(cls, dataset: PreparedDataset, dim: int, seed: int) -> "BehaviourEmbedder":
        """Count co-occurrences in the training histories of ``dataset``.

        Raises:
            ValueError: if no two different items ever stand near each other.
        """
        counts = co_occurrences(dataset)
        if counts.nnz == 0:
            raise ValueError(
                f"{dataset.path}: SemanticIdConfig.embedding needs training histories with two different items to read behaviour, "
                "there are none; prepare longer histories, or give prepare an item table (--items) and use embedding='text'"
            )
        smoothed = np.asarray(counts.sum(axis=0)).ravel() ** CONTEXT_SMOOTHING
        probabilities = smoothed / smoothed.sum()
        directions = fit_directions(_ppmi(counts, probabilities), dim, seed)
        return cls(dataset.items()["item_id"], probabilities, directions)

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``; an item that is not in the basis is placed by its co-occurrence with the basis."""
        items = dataset.items().select("item_id", "item_index")
        columns = pl.DataFrame({"item_id": self.basis_ids}).join(items, on="item_id", how="left", maintain_order="left")["item_index"]
        if columns.has_nulls():
            lost = self.basis_ids.filter(columns.is_null()).to_list()
            raise ValueError(f"{dataset.path}: must hold all items that the embedding was made from; {len(lost)} are missing: {lost[:5]}")
        counts = csr_array(co_occurrences(dataset)[:, columns.to_numpy()])
        return project(_ppmi(counts, self.context_probabilities), self.directions)

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``."""
        frame = pl.DataFrame({"item_id": self.basis_ids, "context_probability": self.context_probabilities})
        frame.write_parquet(directory / BASIS_FILE)
        np.save(directory / DIRECTIONS_FILE, self.directions)
        return {"dim": len(self.directions), "window": WINDOW}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "BehaviourEmbedder":
        """Read what ``save`` wrote."""
        frame = pl.read_parquet(directory / BASIS_FILE)
        is_older = not (directory / DIRECTIONS_FILE).exists()
        directions = np.load(directory / (OLDER_DIRECTIONS_FILE if is_older else DIRECTIONS_FILE), allow_pickle=False)
        return cls(frame["item_id"], frame["context_probability"].to_numpy().copy(), directions)


def co_occurrences(dataset: PreparedDataset, window: int = WINDOW) -> csr_array:
    """``(N, N)`` symmetric: each pair of different items at most ``window`` events apart adds 1 / distance."""
    num_items = dataset.manifest.num_items
    total = csr_array((num_items, num_items), dtype=np.float64)
    for offsets, items in iterate_train_items(dataset):
        user = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        shard = csr_array(total.shape, dtype=np.float64)
        # one distance at a time: the pairs of a whole window would take `window` times the memory of the shard
        for distance in range(1, min(window, len(items) - 1) + 1):
            left, right = items[:-distance], items[distance:]
            kept = (user[:-distance] == user[distance:]) & (left != right)
            weight = np.full(int(kept.sum()), 1.0 / distance)
            shard = shard + csr_array((weight, (left[kept], right[kept])), shape=total.shape)
        total = total + shard
    return csr_array(total + total.T)


def _ppmi(counts: csr_array, context_probabilities: NDArray[np.float64]) -> csr_array:
    """``max(0, log(p(context | item) / p(context)))``, ``(n, X)`` fp32 and as sparse as ``counts``."""
    row_sums = np.asarray(counts.sum(axis=1)).ravel()
    rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
    with np.errstate(divide="ignore"):
        # a context that was never seen when the basis was made has probability 0: it says nothing
        information = np.log(counts.data / row_sums[rows]) - np.log(context_probabilities[counts.indices])
    values = np.where(np.isfinite(information), np.maximum(information, 0.0), 0.0).astype(np.float32)
    return csr_array((values, counts.indices, counts.indptr), shape=counts.shape)
