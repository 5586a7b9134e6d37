"""From table rows, context rows and semantic-ID codes to the encoder's input tokens."""

# L tokens, C code levels, F item features, D model width (docs/shapes.md)

import torch
from torch import Tensor, nn

from gbla_kernels import Backend, keyed_dropout
from gbla_rec.config import EmbeddingConfig
from gbla_rec.models.layers import initialized_linear

ID_DROPOUT_SALT, TOKEN_DROPOUT_SALT, EVENT_DROPOUT_SALT = 2001, 2002, 2003


class HistoryInput(nn.Module):
    """Concatenates the embeddings of an event and projects them to the model width (multi-hash: arXiv 2606.07317)."""

    def __init__(
        self,
        features: list[str],
        config: EmbeddingConfig,
        code_widths: tuple[int, ...],
        model_dim: int,
        *,
        feature_dim: int = 0,
        backend: Backend,
    ) -> None:
        """Make the parts.

        Args:
            features: of the tables, those of the item ids first.
            config: of the tables and codes.
            code_widths: codes of each level, ``C`` entries.
            model_dim: ``D``.
            feature_dim: ``F``, width of the item features; 0: there are none.
            backend: of the dropouts.
        """
        super().__init__()
        self.features, self.config, self.backend = features, config, backend
        code_dim = config.semantic_code_dim
        self.code_embeddings = nn.ModuleList(nn.Embedding(width, code_dim) for width in code_widths if code_dim)
        for embedding in self.code_embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=max(code_dim, 1) ** -0.5)
        in_dim = len(features) * config.dim + len(self.code_embeddings) * code_dim + feature_dim
        num_parts = len(features) + len(self.code_embeddings) + (feature_dim > 0)
        # rows have variance 1 / dim: the scale brings the token to unit variance
        self.projection = initialized_linear(in_dim, model_dim, scale=(in_dim / num_parts) ** 0.5)

    def forward(self, rows: list[Tensor], codes: Tensor, item_features: Tensor | None = None, token_keys: Tensor | None = None) -> Tensor:
        """Build the tokens.

        Args:
            rows: ``(L, table_dim)`` of each feature, in order.
            codes: ``(L, C)`` int64 semantic-ID codes of the items.
            item_features: ``(L, F)`` features of the items, where the input has any.
            token_keys: ``(L,)`` int64, in training: choose the events whose ids are left out.

        Returns:
            ``(L, D)``.
        """
        num_ids = self.config.num_hashes
        parts = [self._drop_ids(row, token_keys) for row in rows[:num_ids]] + rows[num_ids:]
        parts += [embedding(codes[:, level]) for level, embedding in enumerate(self.code_embeddings)]
        if item_features is not None:
            parts.append(item_features.to(rows[0].dtype))
        tokens = self.projection(torch.cat(parts, dim=-1))
        tokens = keyed_dropout(tokens, token_keys, self.config.token_dropout, TOKEN_DROPOUT_SALT, backend=self.backend)
        return tokens * self._kept(tokens, token_keys, self.config.event_dropout, EVENT_DROPOUT_SALT)

    def items(self, rows: list[Tensor], codes: Tensor, item_features: Tensor | None = None) -> Tensor:
        """Items on their own, without a context: the vectors ``(n, D)`` that the item-level head scores; arguments as in ``forward``."""
        num_ids = self.config.num_hashes
        return self([*rows[:num_ids], *(torch.zeros_like(row) for row in rows[num_ids:])], codes, item_features)  # type: ignore[no-any-return]

    def _drop_ids(self, row: Tensor, token_keys: Tensor | None) -> Tensor:
        probability = self.config.id_dropout
        if probability == 1:
            # a product, not zeros: the tables' backward must run on every rank
            return row * 0
        return row * self._kept(row, token_keys, probability, ID_DROPOUT_SALT)

    def _kept(self, x: Tensor, token_keys: Tensor | None, probability: float, salt: int) -> Tensor | int:
        """``(L, 1)`` in the dtype of ``x``: one draw for each event, 0 or ``1 / (1 - probability)``."""
        if token_keys is None or probability == 0:
            return 1
        # two hashes wide: a compiler may lay out a single column so that torch cannot view its bits
        return keyed_dropout(x.new_ones(x.shape[0], 8), token_keys, probability, salt, backend=self.backend)[:, :1]
