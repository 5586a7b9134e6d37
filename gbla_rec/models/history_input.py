"""From table rows, context rows and semantic-ID codes to the encoder's input tokens."""

# L tokens, C code levels, D model width (docs/shapes.md)

import torch
from torch import Tensor, nn

from gbla_rec.models.layers import initialized_linear


class HistoryInput(nn.Module):
    """Concatenates the embeddings of an event and projects them to the model width (multi-hash: arXiv 2606.07317)."""

    def __init__(self, features: list[str], table_dim: int, code_widths: tuple[int, ...], code_dim: int, model_dim: int) -> None:
        super().__init__()
        self.features = features
        self.code_embeddings = nn.ModuleList(nn.Embedding(width, code_dim) for width in code_widths if code_dim)
        for embedding in self.code_embeddings:
            assert isinstance(embedding, nn.Embedding)
            nn.init.normal_(embedding.weight, std=max(code_dim, 1) ** -0.5)
        in_dim = len(features) * table_dim + len(self.code_embeddings) * code_dim
        # rows have variance 1 / dim: the scale brings the token to unit variance
        self.projection = initialized_linear(in_dim, model_dim, scale=(in_dim / (len(features) + len(self.code_embeddings))) ** 0.5)

    def forward(self, rows: list[Tensor], codes: Tensor) -> Tensor:
        """Build the tokens.

        Args:
            rows: ``(L, table_dim)`` of each feature, in order.
            codes: ``(L, C)`` int64 semantic-ID codes of the items.

        Returns:
            ``(L, D)``.
        """
        parts = rows + [embedding(codes[:, level]) for level, embedding in enumerate(self.code_embeddings)]
        return self.projection(torch.cat(parts, dim=-1))  # type: ignore[no-any-return]
