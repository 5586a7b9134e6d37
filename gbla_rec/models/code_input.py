"""Histories as sequences of semantic-ID codes, the encoder's input of TIGER (Rajput et al., arXiv 2305.05065)."""

# L events, C code levels, D model width (docs/shapes.md)

import torch
from torch import Tensor, nn

from gbla_kernels import Backend
from gbla_rec.config import EmbeddingConfig
from gbla_rec.models.history_input import HistoryInput
from gbla_rec.models.layers import initialized_linear


def token_input(
    config: EmbeddingConfig,
    features: list[str],
    code_widths: tuple[int, ...],
    model_dim: int,
    *,
    feature_dim: int = 0,
    backend: Backend,
) -> "HistoryInput | CodeInput":
    """The input layer that ``config.tokens`` asks for.

    Args:
        config: of the tables.
        features: keys of the tables, item tables first.
        code_widths: codes of each level, ``C`` entries.
        model_dim: ``D``.
        feature_dim: ``F``, width of the item features; 0: there are none.
        backend: of the dropouts.
    """
    if config.tokens == "codes":
        return CodeInput(features, config.num_item_tables, config.dim, code_widths, model_dim)
    return HistoryInput(features, config, code_widths, model_dim, feature_dim=feature_dim, backend=backend)


class CodeInput(nn.Module):
    """A token for each code, each level with an embedding of its own; the first token of an event also carries the event's context."""

    def __init__(self, features: list[str], num_unread: int, table_dim: int, code_widths: tuple[int, ...], model_dim: int) -> None:
        super().__init__()
        self.features, self.num_unread = features, num_unread
        self.code_embeddings = nn.ModuleList(nn.Embedding(width, model_dim) for width in code_widths)
        for embedding in self.code_embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight)
        context_dim = (len(features) - num_unread) * table_dim
        # rows have variance 1 / dim: the scale brings what is added to unit variance
        self.context_projection = initialized_linear(context_dim, model_dim, scale=table_dim**0.5) if context_dim else None

    def forward(self, rows: list[Tensor], codes: Tensor, item_features: None = None, token_keys: Tensor | None = None) -> Tensor:
        """Build the tokens; ids and features of items are not read, so there are none to leave out.

        Args:
            rows: of each feature, in order: ``(0, table_dim)`` of the item tables, ``(L, table_dim)`` of context columns.
            codes: ``(L, C)`` int64 semantic-ID codes of the items.
            item_features: none.
            token_keys: of no use here.

        Returns:
            ``(L * C, D)``, the codes of an event side by side.
        """
        tokens = torch.stack([embedding(codes[:, level]) for level, embedding in enumerate(self.code_embeddings)], dim=1)
        if self.context_projection is not None:
            context = self.context_projection(torch.cat(rows[self.num_unread :], dim=-1))
            tokens = torch.cat([tokens[:, :1] + context[:, None], tokens[:, 1:]], dim=1)
        # sums of nothing: tables that are not looked up take part in backward on every rank, and step by nothing
        nothing = torch.cat(rows[: self.num_unread]).sum()
        return (tokens + nothing).flatten(0, 1).to(_product_dtype(tokens))


def _product_dtype(x: Tensor) -> torch.dtype:
    """What a product of ``x`` would have: the encoder's stream is as exact as with tokens that are projected."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
