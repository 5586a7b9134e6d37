"""Semantic IDs."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gbla_rec.config.rules import require, require_choice, require_positive

EmbeddingSource = Literal["text", "behaviour", "text_and_behaviour", "file", "auto"]
TextEncoder = Literal["tfidf", "wordllama", "minilm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SemanticIdConfig:
    """From item embeddings to semantic IDs (residual k-means and a de-duplication level)."""

    embedding: EmbeddingSource = "text"
    """``auto``: text if any item of the dataset has some, else behaviour for all."""
    embedding_file: Path | None = None
    """For ``embedding="file"``: ``.npy`` of shape (N, D) in item order, or Parquet with item_id and a list column."""
    text_encoder: TextEncoder = "tfidf"
    """``tfidf``: words and word pairs; ``wordllama``, ``minilm``: pretrained vectors, by the extras ``text`` and ``minilm``."""
    text_columns: tuple[str, ...] = ()
    """Text columns to embed, in the order in which they are read. Empty: all of the dataset, its title first."""
    behaviour_weight: float = 1.0
    """For ``embedding="text_and_behaviour"``: length of the behaviour part beside a text part of length 1."""
    embedding_dim: int = 96
    """Width of the text part and of the behaviour part, at most."""
    num_levels: int = 3
    """Codebooks; the de-duplication level comes after them."""
    codebook_width: int | None = None
    """None: the next power of two >= (4 N)^(1/3), at least ``min_codebook_width``."""
    min_codebook_width: int = 256
    dedup_width: int = 256
    """Items under one prefix beyond this number share an ID (reported)."""
    balance: float | None = None
    """At least 1: no code of a level goes to more than that many times the even share of the items (1 shares out evenly)."""
    distinct_last_code: bool = False
    """Items alike in all codes before the last level get different last codes while there are enough; that level has no
    capacity then. Leaves the de-duplication level to items added later and to prefixes wider than a codebook."""
    kmeans_iterations: int = 25
    """Of each codebook."""
    seed: int = 0

    def __post_init__(self) -> None:
        require_choice(self, "embedding", EmbeddingSource)
        require_choice(self, "text_encoder", TextEncoder)
        require(
            (self.embedding == "file") == (self.embedding_file is not None),
            "SemanticIdConfig.embedding_file",
            "be given exactly when embedding='file'",
            self.embedding_file,
        )
        require_positive(self, "embedding_dim", "num_levels", "min_codebook_width", "dedup_width", "kmeans_iterations")
        if self.codebook_width is not None:
            require_positive(self, "codebook_width")
        require(
            len(set(self.text_columns)) == len(self.text_columns),
            "SemanticIdConfig.text_columns",
            "name each column once",
            self.text_columns,
        )
        require(
            0 <= self.behaviour_weight < math.inf, "SemanticIdConfig.behaviour_weight", "be finite and at least 0", self.behaviour_weight
        )
        if self.balance is not None:
            require(1 <= self.balance < math.inf, "SemanticIdConfig.balance", "be finite and at least 1, or None", self.balance)
