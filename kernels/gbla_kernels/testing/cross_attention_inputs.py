"""Jagged inputs of cross-attention: rows of few queries beside rows of many keys."""

# L tokens, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.cross_attention.api import jagged_cross_attention
from gbla_kernels.layout import JaggedLayout

Rows = Sequence[tuple[int, int]]
"""Queries and keys of each row."""


@dataclass(frozen=True, kw_only=True)
class CrossAttention:
    """A backend with the dtype, the device and the widths that it is tested with."""

    backend: Backend
    dtype: torch.dtype
    device: str = "cpu"
    num_heads: int = 2
    key_dim: int = 20
    value_dim: int = 24

    def layouts(self, rows: Rows) -> tuple[JaggedLayout, JaggedLayout]:
        """Of queries and of keys."""
        queries, keys = (JaggedLayout.from_lengths([row[side] for row in rows]).to(self.device) for side in (0, 1))
        return queries, keys

    def inputs(self, rows: Rows, seed: int = 0) -> dict[str, Tensor]:
        """``query``, ``key`` and ``value``; the last two are views of one projection where their widths allow it."""
        generator = torch.Generator().manual_seed(seed)
        num_queries, num_keys = sum(row[0] for row in rows), sum(row[1] for row in rows)
        widths = self.num_heads * self.key_dim, self.num_heads * self.value_dim
        query = torch.randn(num_queries, self.num_heads, self.key_dim, generator=generator, dtype=torch.float64)
        projection = torch.randn(num_keys, sum(widths), generator=generator, dtype=torch.float64).to(self.device, self.dtype)
        key, value = projection.split(widths, dim=1)
        return {
            "query": query.to(self.device, self.dtype),
            "key": key.unflatten(1, (self.num_heads, self.key_dim)),
            "value": value.unflatten(1, (self.num_heads, self.value_dim)),
        }

    def op(self, rows: Rows) -> Callable[..., Tensor]:
        """The op of the three tensors alone."""
        queries, keys = self.layouts(rows)
        return partial(jagged_cross_attention, query_layout=queries, key_layout=keys, backend=self.backend)

    def reference(self, rows: Rows) -> Callable[..., Tensor]:
        """The same on the reference backend."""
        queries, keys = self.layouts(rows)
        return partial(jagged_cross_attention, query_layout=queries, key_layout=keys, backend=Backend.REFERENCE)
