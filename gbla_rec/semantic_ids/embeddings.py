"""Item embeddings: the vectors that semantic IDs are made of, from text, behaviour, both or a file.

An embedder is fitted once and saved as arrays and JSON beside the table, so that items added later are embedded the
same way. An item about which nothing is known (no text, no training event) has the zero vector.
"""

import json
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import EmbeddingSource, SemanticIdConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.behaviour_embeddings import BehaviourEmbedder
from gbla_rec.semantic_ids.file_embeddings import FileEmbedder
from gbla_rec.semantic_ids.text_and_behaviour_embeddings import TextAndBehaviourEmbedder
from gbla_rec.semantic_ids.text_embeddings import has_text
from gbla_rec.semantic_ids.text_encoders import TEXT_EMBEDDERS, fit_text_embedder

EMBEDDING_FILE = "embedding.json"
Embeddings = NDArray[np.float32]


class ItemEmbedder(Protocol):
    """What turns the items of a prepared dataset into vectors."""

    def embed(self, dataset: PreparedDataset) -> Embeddings:
        """``(N, F)`` fp32, finite, in item order; deterministic on one machine."""
        ...

    def save(self, directory: Path) -> dict[str, Any]:
        """Write ``embedding_*`` arrays into ``directory`` and return what ``embedding.json`` says beside them."""
        ...


def fit_embedder(dataset: PreparedDataset, config: SemanticIdConfig) -> ItemEmbedder:
    """Fit the embedder that ``config`` asks for on the items, and on the training events only, of ``dataset``.

    Raises:
        ValueError: if the dataset lacks what the embedder reads, or an embedding file is malformed.
        ModuleNotFoundError: if the package of ``text_encoder`` is not installed; the message names the extra.
    """
    source = embedding_source(dataset, config)
    if source == "file":
        assert config.embedding_file is not None
        return FileEmbedder(config.embedding_file)
    if source == "behaviour":
        return BehaviourEmbedder.fit(dataset, config.embedding_dim, config.seed)
    text = fit_text_embedder(dataset, config)
    if source == "text":
        return text
    behaviour = BehaviourEmbedder.fit(dataset, config.embedding_dim, config.seed)
    return TextAndBehaviourEmbedder(text, behaviour, config.behaviour_weight)


def embedding_source(dataset: PreparedDataset, config: SemanticIdConfig) -> EmbeddingSource:
    """``config.embedding``, with ``auto`` decided by the dataset."""
    if config.embedding != "auto":
        return config.embedding
    return "text" if has_text(dataset, config.text_columns) else "behaviour"


def save_embedder(embedder: ItemEmbedder, directory: Path) -> None:
    """Write ``embedding.json`` and the arrays it needs; ``load_embedder`` reads them back."""
    text = json.dumps({"kind": type(embedder).__name__, **embedder.save(directory)}, indent=2)
    (directory / EMBEDDING_FILE).write_text(text + "\n", encoding="utf-8")


def load_embedder(directory: Path, embedding_file: Path | None = None) -> ItemEmbedder:
    """The embedder saved in ``directory``.

    Args:
        directory: a directory of semantic IDs.
        embedding_file: vectors of the new items, if the saved embedder reads a file: they are nowhere else.

    Raises:
        ValueError: if ``embedding_file`` is missing, or given to an embedder that reads none.
    """
    saved: dict[str, Any] = json.loads((directory / EMBEDDING_FILE).read_text(encoding="utf-8"))
    if (saved["kind"] == FileEmbedder.__name__) != (embedding_file is not None):
        raise ValueError(
            f"embedding_file must be given exactly when the semantic IDs come from a file of vectors; {directory} was made by "
            f"{saved['kind']}, got embedding_file={embedding_file}"
        )
    if embedding_file is not None:
        return FileEmbedder(embedding_file)
    loaders = {kind.__name__: kind.load for kind in (BehaviourEmbedder, TextAndBehaviourEmbedder, *TEXT_EMBEDDERS.values())}
    return loaders[saved["kind"]](directory, saved)
