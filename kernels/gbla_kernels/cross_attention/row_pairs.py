"""What a launch must know about the rows of queries and keys: all from the host, so that nothing synchronises."""

# B rows, L tokens, Z splits, G rows that have keys (docs/shapes.md)

from typing import Any, NamedTuple

from torch import Tensor

from gbla_kernels.cross_attention.launch_config import LaunchConfig
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.row_splits import MAX_SPLITS

KEYS_PER_QUERY = 16
"""Keys of a part for each query of the row, at least: partial outputs are then at most an eighth of the bytes of bf16 keys."""
BACKWARD_KEYS_PER_QUERY = 8
"""The same for partial dq beside keys and their gradients."""
MIN_PART = 512
"""Keys of a part, at least: enough to hide the start of a program."""


class RowPairs(NamedTuple):
    """Rows of queries and their rows of keys. The numbers change what is allocated and launched, never a result.

    A part is a run of neighbouring splits of a row of keys that one program takes; its length depends on the row alone.

    Attributes:
        query_offsets: ``(B + 1,)`` int64.
        key_rows: ``(L_key,)`` int64, the row of each key.
        splits: ``(Z, 3)`` int64, see ``RowSplits``: every row of keys is cut.
        slot_offsets: ``(G + 1,)`` int64, likewise.
        max_queries: of one row.
        parts_per_query: where partial results lie. 0: for each split there is room for ``max_queries``. Else for each query there
            is room for so many parts, which is less if rows differ much in their queries.
        has_parts: whether a row may have several parts in the forward.
        has_gradient_parts: whether a row may have several parts, or tiles, in the backward.
        has_many_queries: whether a row may have more queries than the backward's small tile.
        has_tiled_rows: whether a row may have more queries than the backward's large tile.
        has_empty_rows: whether a row may have no keys.
    """

    query_offsets: Tensor
    key_rows: Tensor
    splits: Tensor
    slot_offsets: Tensor
    max_queries: int
    parts_per_query: int
    has_parts: bool
    has_gradient_parts: bool
    has_many_queries: bool
    has_tiled_rows: bool
    has_empty_rows: bool

    @classmethod
    def from_layouts(cls, query_layout: JaggedLayout, key_layout: JaggedLayout, config: LaunchConfig, *, is_traced: bool) -> "RowPairs":
        """From the layouts. Under a compiler sizes are symbols, and only the longest rows are looked at."""
        max_queries, max_keys, splits = query_layout.max_length, key_layout.max_length, key_layout.all_splits
        has_tiled_rows = max_queries > config.tiled_above
        has_empty_rows, parts_per_query = True, 0
        least_part = least_gradient_part = MIN_PART
        if not is_traced:
            num_rows, num_queries = query_layout.num_rows, query_layout.num_tokens
            if num_queries == num_rows * max_queries:
                # all rows have as many queries, as in beam search: the length of parts is known
                least_part = max(MIN_PART, KEYS_PER_QUERY * max_queries)
                least_gradient_part = max(MIN_PART, BACKWARD_KEYS_PER_QUERY * max_queries)
            has_empty_rows = key_layout.num_tokens == 0 or 0 in key_layout.row_lengths
            max_parts = min(MAX_SPLITS, -(-max_keys // least_gradient_part))
            if max_parts * num_queries < splits.splits.shape[0] * max_queries:
                parts_per_query = max_parts
        return cls(
            query_offsets=query_layout.offsets,
            key_rows=key_layout.rows,
            splits=splits.splits,
            slot_offsets=splits.slot_offsets,
            max_queries=max_queries,
            parts_per_query=parts_per_query,
            has_parts=max_keys > least_part,
            has_gradient_parts=max_keys > least_gradient_part or has_tiled_rows,
            has_many_queries=max_queries > config.many_above,
            has_tiled_rows=has_tiled_rows,
            has_empty_rows=has_empty_rows,
        )

    def num_partials(self, num_queries: Any) -> Any:
        """Rows of a buffer of partial results; ``num_queries`` is ``L_query``."""
        return self.parts_per_query * num_queries if self.parts_per_query else self.splits.shape[0] * self.max_queries

    def partial_strides(self, num_queries: Any) -> tuple[Any, Any, Any]:
        """Factors of split, part and first query of the row, in the place of a partial result."""
        return (0, num_queries, 1) if self.parts_per_query else (self.max_queries, 0, 0)
