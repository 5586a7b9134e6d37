"""Semantic IDs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gbla_rec.config.rules import require, require_choice, require_positive

EmbeddingSource = Literal["text", "behaviour", "file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticIdConfig:
    """From item embeddings to semantic IDs (residual k-means and a de-duplication level)."""

    embedding: EmbeddingSource = "text"
    embedding_file: Path | None = None
    """For ``embedding="file"``: ``.npy`` of shape (N, D) in item order, or Parquet with item_id and a list column."""
    text_encoder: Literal["tfidf", "wordllama"] = "tfidf"
    embedding_dim: int = 96
    num_levels: int = 3
    codebook_width: int | None = None
    """None: the next power of two >= (4 N)^(1/3), at least ``min_codebook_width``."""
    min_codebook_width: int = 256
    dedup_width: int = 256
    """Items under one prefix beyond this number share an ID (reported)."""
    kmeans_iterations: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice(self, "embedding", EmbeddingSource)
        require(
            (self.embedding == "file") == (self.embedding_file is not None),
            "SemanticIdConfig.embedding_file",
            "be given exactly when embedding='file'",
            self.embedding_file,
        )
        require_positive(self, "embedding_dim", "num_levels", "min_codebook_width", "dedup_width", "kmeans_iterations")
        if self.codebook_width is not None:
            require_positive(self, "codebook_width")
