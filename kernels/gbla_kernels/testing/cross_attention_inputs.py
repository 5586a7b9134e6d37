"""Cross-attention under test: rows of few queries beside rows of many keys, and what fp64 says about the error."""

# L tokens, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.cross_attention.api import jagged_cross_attention
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.testing.attention_subject import FLOOR, Op, Results, assert_same_bits, assert_within, results
from gbla_kernels.testing.error_budget import relative_error

Rows = Sequence[tuple[int, int]]
"""Queries and keys of each row."""
QUERY_SIDE = ("query", "output", "d_query")


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
        """``query``, ``key`` and ``value``; the last two are views of one projection."""
        generator = torch.Generator().manual_seed(seed)
        num_queries, num_keys = sum(row[0] for row in rows), sum(row[1] for row in rows)
        widths = [self.num_heads * self.key_dim, self.num_heads * self.value_dim]
        query = torch.randn(num_queries, self.num_heads, self.key_dim, generator=generator).to(self.device, self.dtype)
        key, value = torch.randn(num_keys, sum(widths), generator=generator).to(self.device, self.dtype).split(widths, dim=1)
        heads = self.num_heads
        return {"query": query, "key": key.unflatten(1, (heads, self.key_dim)), "value": value.unflatten(1, (heads, self.value_dim))}

    def op(self, rows: Rows) -> Op:
        """The op of the three tensors alone."""
        queries, keys = self.layouts(rows)
        return partial(jagged_cross_attention, query_layout=queries, key_layout=keys, backend=self.backend)

    def run(self, inputs: dict[str, Tensor], rows: Rows, *, d_output: Tensor | None = None) -> Results:
        """Output and every gradient, see ``results``."""
        return results(self.op(rows), inputs, d_output)

    def assert_within_budget(self, inputs: dict[str, Tensor], rows: Rows) -> None:
        """Twice the error of the reference that computes in fp32 and rounds once, at least ``FLOOR``.

        Raises:
            AssertionError: names the tensor, its error and its budget.
        """
        reference = replace(self, backend=Backend.REFERENCE)
        exact = reference.run({name: tensor.double() for name, tensor in inputs.items()}, rows)
        rounded = reference.run(inputs, rows)
        budget = {name: max(2 * relative_error(value, exact[name]), FLOOR[self.dtype]) for name, value in rounded.items()}
        assert_within(self.run(inputs, rows), exact, budget)

    def assert_each_row_is_alone(self, rows: Rows, order: Sequence[int]) -> None:
        """Rows packed in this order give the bits of each row alone.

        Raises:
            AssertionError: names the tensor.
        """
        parts = {name: tensor.split(_lengths(name, rows)) for name, tensor in self.inputs(rows).items()}
        packed_rows = [rows[i] for i in order]
        # the same for every query, so that it does not depend on the order
        weights = torch.linspace(-1, 1, self.value_dim, device=self.device).expand(sum(row[0] for row in rows), self.num_heads, -1)
        packed = self.run({name: torch.cat([split[i] for i in order]) for name, split in parts.items()}, packed_rows, d_output=weights)
        split_results = {name: value.split(_lengths(name, packed_rows)) for name, value in packed.items()}
        for place, i in enumerate(order):
            alone = self.run({name: split[i] for name, split in parts.items()}, [rows[i]], d_output=weights[: rows[i][0]])
            assert_same_bits({name: split[place] for name, split in split_results.items()}, alone)


def _lengths(name: str, rows: Rows) -> list[int]:
    return [row[0 if name in QUERY_SIDE else 1] for row in rows]
