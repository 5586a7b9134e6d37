"""Item embeddings from item text: TF-IDF with truncated SVD (no download), or WordLlama's static word vectors."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.feature_extraction.text import TfidfVectorizer

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.reduction import fit_directions, project
from gbla_rec.semantic_ids.unit_rows import normalize_rows

MAX_TERMS = 100_000
TERMS_FILE = "embedding_terms.parquet"
DIRECTIONS_FILE = "embedding_directions.npy"
# separators that catalogues put between genres and categories
SEPARATORS = re.compile(r"[|;/>_]+")


def has_text(dataset: PreparedDataset, columns: Sequence[str] = ()) -> bool:
    """Whether any item has a letter or digit in ``columns``, or, if they are empty, in any text column.

    Raises:
        ValueError: if the dataset lacks one of ``columns``.
    """
    _require_text_columns(dataset, columns)
    columns = columns or dataset.manifest.text_columns
    texts = dataset.items().select(columns)
    return any(character.isalnum() for name in columns for text in texts[name].drop_nulls() for character in text)


def item_texts(dataset: PreparedDataset, columns: Sequence[str] = ()) -> list[str]:
    """Text columns of each item joined, separators such as ``|`` opened; an empty string where there is no text.

    Args:
        dataset: prepared, with text columns.
        columns: which of them, in this order; empty: all, the title first.

    Raises:
        ValueError: if the dataset has no text columns or lacks one of ``columns``, or not a single item has text.
    """
    present = dataset.manifest.text_columns
    cure = "give an item table to prepare (--items), or use embedding='behaviour' (--semantic-ids.embedding behaviour)"
    if not present:
        raise ValueError(f"{dataset.path}: SemanticIdConfig.embedding='text' needs item text, the dataset has no text columns; {cure}")
    _require_text_columns(dataset, columns)
    columns = columns or present
    joined = dataset.items().select(pl.concat_str(columns, separator=" | ", ignore_nulls=True).fill_null("")).to_series()
    texts = [SEPARATORS.sub(" ", text).strip() for text in joined]
    if not any(texts):
        raise ValueError(f"{dataset.path}: SemanticIdConfig.embedding='text' needs item text, {columns} are empty for every item; {cure}")
    return texts


def _require_text_columns(dataset: PreparedDataset, columns: Sequence[str]) -> None:
    present = dataset.manifest.text_columns
    unknown = [column for column in columns if column not in present]
    if unknown:
        raise ValueError(f"{dataset.path}: SemanticIdConfig.text_columns must be among the text columns {present}, got {unknown}")


@dataclass(frozen=True, eq=False)
class TfidfEmbedder:
    """TF-IDF of words and word pairs, reduced by truncated SVD (latent semantic analysis).

    Attributes:
        columns: as ``item_texts`` reads them.
        terms: the ``X`` words and pairs, in column order.
        idf: ``(X,)`` fp64 inverse document frequencies.
        directions: ``(F, X)`` fp32.
    """

    columns: tuple[str, ...]
    terms: Sequence[str]
    idf: NDArray[np.float64]
    directions: NDArray[np.float32]

    @classmethod
    def fit(cls, dataset: PreparedDataset, dim: int, seed: int, columns: tuple[str, ...] = ()) -> "TfidfEmbedder":
        """Learn terms and directions from the items of ``dataset``; errors as ``item_texts``."""
        texts = item_texts(dataset, columns)
        # a term of one item relates it to no other; without any shared term, all terms are better than none
        for min_df in (2, 1):
            vectorizer = _vectorizer(min_df=min_df, max_features=MAX_TERMS)
            try:
                matrix = vectorizer.fit_transform(texts)
                break
            except ValueError as error:
                if min_df == 1:
                    raise ValueError(f"{dataset.path}: item texts hold no letters or digits, e.g. {next(filter(None, texts))!r}") from error
        terms = vectorizer.get_feature_names_out().tolist()
        return cls(columns, terms, vectorizer.idf_, fit_directions(csr_array(matrix, dtype=np.float32), dim, seed))

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``."""
        vectorizer = _vectorizer(vocabulary=self.terms)
        vectorizer.idf_ = self.idf
        return project(csr_array(vectorizer.transform(item_texts(dataset, self.columns)), dtype=np.float32), self.directions)

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``."""
        pl.DataFrame({"term": self.terms, "idf": self.idf}).write_parquet(directory / TERMS_FILE)
        np.save(directory / DIRECTIONS_FILE, self.directions)
        return {"columns": self.columns, "dim": len(self.directions), "num_terms": len(self.terms)}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "TfidfEmbedder":
        """Read what ``save`` wrote."""
        frame = pl.read_parquet(directory / TERMS_FILE)
        directions = np.load(directory / DIRECTIONS_FILE, allow_pickle=False)
        return cls(tuple(saved.get("columns", ())), frame["term"].to_list(), frame["idf"].to_numpy().copy(), directions)


@dataclass(frozen=True, eq=False)
class WordLlamaEmbedder:
    """Averages of WordLlama's word vectors (they come inside its wheel), reduced by truncated SVD where narrower ones are wanted.

    Attributes:
        columns: as ``item_texts`` reads them.
        directions: ``(F, 256)`` fp32.
    """

    columns: tuple[str, ...]
    directions: NDArray[np.float32]

    @classmethod
    def fit(cls, dataset: PreparedDataset, dim: int, seed: int, columns: tuple[str, ...] = ()) -> "WordLlamaEmbedder":
        """Learn the directions; ``ModuleNotFoundError`` if WordLlama is not installed, errors as ``item_texts``."""
        return cls(columns, fit_directions(_word_llama(item_texts(dataset, columns)), dim, seed))

    def embed(self, dataset: PreparedDataset) -> NDArray[np.float32]:
        """See ``ItemEmbedder``."""
        return project(_word_llama(item_texts(dataset, self.columns)), self.directions)

    def save(self, directory: Path) -> dict[str, Any]:
        """See ``ItemEmbedder``."""
        np.save(directory / DIRECTIONS_FILE, self.directions)
        return {"columns": self.columns, "dim": len(self.directions)}

    @classmethod
    def load(cls, directory: Path, saved: dict[str, Any]) -> "WordLlamaEmbedder":
        """Read what ``save`` wrote."""
        return cls(tuple(saved.get("columns", ())), np.load(directory / DIRECTIONS_FILE, allow_pickle=False))


def _vectorizer(**settings: Any) -> TfidfVectorizer:
    # one-character words count: "3", "X"
    return TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", strip_accents="unicode", sublinear_tf=True, **settings)


def _word_llama(texts: list[str]) -> NDArray[np.float32]:
    try:
        import wordllama
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "SemanticIdConfig.text_encoder='wordllama' needs the package wordllama; install it with: pip install 'gbla-rec[text]' "
            "(or use text_encoder='tfidf')"
        ) from error
    model = wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)
    return normalize_rows(np.asarray(model.embed(texts), dtype=np.float32))
