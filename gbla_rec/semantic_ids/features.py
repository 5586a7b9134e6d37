"""Item features: the vectors that the semantic IDs were made from, kept beside the table as input features of a model."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gbla_rec.semantic_ids.table import MANIFEST_FILE, RETOKENIZE
from gbla_rec.semantic_ids.unit_rows import normalize_rows

FEATURES_FILE = "item_features.npy"


def save_item_features(embeddings: NDArray[np.float32], directory: Path) -> None:
    """Write ``item_features.npy``: ``embeddings`` ``(N, F)``, rows in item order, each of length 1 or zero."""
    np.save(directory / FEATURES_FILE, normalize_rows(np.asarray(embeddings, dtype=np.float32)))


def load_item_features(directory: Path, num_items: int) -> NDArray[np.float32]:
    """Read what ``tokenize`` or ``append_items`` wrote; ``SemanticIdTable.load`` checks the file's hash.

    Args:
        directory: a directory of semantic IDs.
        num_items: ``N``, the number of items that the dataset in use has.

    Returns:
        ``(N, F)`` fp32, row ``i`` belongs to item index ``i``: of length 1, or zero for an item about which nothing is known.

    Raises:
        FileNotFoundError: if the directory has no features.
        ValueError: if the file is not a finite fp32 array of ``num_items`` rows.
    """
    path = directory / FEATURES_FILE
    if not path.is_file():
        reason = "the semantic IDs there come without item features" if (directory / MANIFEST_FILE).is_file() else "no semantic IDs there"
        raise FileNotFoundError(f"{path} is missing ({reason}); {RETOKENIZE}")
    try:
        features: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path}: not a readable .npy array ({error}); {RETOKENIZE}") from error
    if features.dtype != np.float32 or features.ndim != 2 or len(features) != num_items or features.shape[1] == 0:
        raise ValueError(
            f"{path}: item features must be float32 of shape ({num_items}, F), one row for each item of the dataset, "
            f"got {features.dtype} of shape {features.shape}; {RETOKENIZE}"
        )
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise ValueError(f"{path}: item features must be finite, {len(bad)} rows are not, first row {bad[0]}; {RETOKENIZE}")
    return features


def feature_dim(directory: Path) -> int | None:
    """``F`` of the features in ``directory``, from the file's header; None if there are none."""
    path = directory / FEATURES_FILE
    return int(np.load(path, mmap_mode="r", allow_pickle=False).shape[1]) if path.is_file() else None
