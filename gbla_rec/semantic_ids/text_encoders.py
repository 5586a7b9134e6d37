"""The text embedders by the name that the config gives them."""

from gbla_rec.config import SemanticIdConfig
from gbla_rec.config.semantic_ids import TextEncoder
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.minilm_embeddings import MiniLmEmbedder
from gbla_rec.semantic_ids.text_embeddings import TfidfEmbedder, WordLlamaEmbedder

TextEmbedder = TfidfEmbedder | WordLlamaEmbedder | MiniLmEmbedder
TEXT_EMBEDDERS: dict[TextEncoder, type[TfidfEmbedder] | type[WordLlamaEmbedder] | type[MiniLmEmbedder]] = {
    "tfidf": TfidfEmbedder,
    "wordllama": WordLlamaEmbedder,
    "minilm": MiniLmEmbedder,
}


def fit_text_embedder(dataset: PreparedDataset, config: SemanticIdConfig) -> TextEmbedder:
    """Fit ``config.text_encoder`` on the texts of ``dataset``; errors as ``fit_embedder``."""
    return TEXT_EMBEDDERS[config.text_encoder].fit(dataset, config.embedding_dim, config.seed, config.text_columns)
