"""The prefix trie of a semantic-ID table, as flat tensors that a beam search can gather from.

Shapes: ``N`` items, ``C`` code levels, ``n_l`` nodes of level ``l`` (level 0 is the root, level ``C`` the leaves)::

    codes            level 0    level 1        level 2             leaf_items
    item 0: (2, 1)                              (0, 3) node 0  ->  1
    item 1: (0, 3)   root -+->  (0) node 0 -->
    item 2: (2, 0)         +->  (2) node 1 -+-> (2, 0) node 1  ->  2
    item 3: (2, 1)                          +-> (2, 1) node 2  ->  0, 3     (a shared ID)

Nodes of a level are numbered in lexicographic order of their prefixes, so the children of neighbouring nodes are
neighbours too, and sorting by node id is sorting by code.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PrefixTrie:
    """All legal prefixes of a table of codes, in compressed rows.

    Attributes:
        widths: codebook width of each of the ``C`` levels.
        num_items: ``N``, the size of the item index space; a restricted trie holds fewer items under the same indices.
        child_offsets: per level ``l < C``: ``(n_l + 1,)`` int64; the children of node ``j`` are the nodes
            ``child_offsets[l][j]:child_offsets[l][j + 1]`` of level ``l + 1``.
        child_tokens: per level ``l < C``: ``(n_{l + 1},)`` int64, the last code of each node of level ``l + 1``.
        parents: per level ``l < C``: ``(n_{l + 1},)`` int64, the parent (a node of level ``l``) of each node of level ``l + 1``.
        leaf_item_offsets: ``(n_C + 1,)`` int64 into ``leaf_items``.
        leaf_items: int64 item indices, grouped by leaf, ascending inside a leaf.
        rank_of_item: ``(N,)`` int64, position of an item in ``leaf_items``; -1 for an item that the trie does not hold.
        leaf_of_item: ``(N,)`` int64, the leaf of an item; -1 for an item that the trie does not hold.
        num_items_below: per level ``l <= C``: ``(n_l,)`` int64.
        widest_rows: per level ``l <= C``: ``(n_l + 1,)`` int64, always on the CPU: entry ``m`` is the number of children
            of the ``m`` nodes that have most (for the leaves: of items), the exact room that ``m`` beams can need.
    """

    widths: tuple[int, ...]
    num_items: int
    child_offsets: tuple[Tensor, ...]
    child_tokens: tuple[Tensor, ...]
    parents: tuple[Tensor, ...]
    leaf_item_offsets: Tensor
    leaf_items: Tensor
    rank_of_item: Tensor
    leaf_of_item: Tensor
    num_items_below: tuple[Tensor, ...]
    widest_rows: tuple[Tensor, ...]

    @classmethod
    def from_codes(cls, codes: Tensor, widths: Sequence[int]) -> "PrefixTrie":
        """Build the trie of ``codes``; items with equal codes share a leaf.

        Args:
            codes: ``(N, C)`` int64, row ``i`` is the semantic ID of item ``i``; the trie is made on its device.
            widths: ``C`` codebook widths.

        Raises:
            ValueError: if the shapes or dtype disagree, or a code lies outside ``[0, width)``.
        """
        check_codes(codes, widths)
        items = torch.arange(codes.shape[0], device=codes.device)
        return cls._build(codes, items, tuple(widths), codes.shape[0])

    @classmethod
    def _build(cls, codes: Tensor, items: Tensor, widths: tuple[int, ...], num_items: int) -> "PrefixTrie":
        """``codes`` ``(n, C)`` belong to the ascending, distinct item indices ``items`` ``(n,)``."""
        device = codes.device
        node = torch.zeros_like(items)
        num_below = [torch.full((1,), len(items), dtype=torch.int64, device=device)]
        child_offsets, child_tokens, parents = [], [], []
        for level, width in enumerate(widths):
            # parent * width + code is below N * width: no overflow, however many levels there are
            keys, node, counts = torch.unique(node * width + codes[:, level], return_inverse=True, return_counts=True)
            parent = keys // width
            child_offsets.append(_offsets(torch.bincount(parent, minlength=len(num_below[-1]))))
            child_tokens.append(keys - parent * width)
            parents.append(parent)
            num_below.append(counts)
        order = torch.argsort(node, stable=True)
        leaf_items = items[order]
        absent = torch.full((num_items,), -1, dtype=torch.int64, device=device)
        leaf_item_offsets = _offsets(num_below[-1])
        rows = (*child_offsets, leaf_item_offsets)
        return cls(
            widths=widths,
            num_items=num_items,
            child_offsets=tuple(child_offsets),
            child_tokens=tuple(child_tokens),
            parents=tuple(parents),
            leaf_item_offsets=leaf_item_offsets,
            leaf_items=leaf_items,
            rank_of_item=absent.index_copy(0, leaf_items, torch.arange(len(leaf_items), device=device)),
            leaf_of_item=absent.index_copy(0, items, node),
            num_items_below=tuple(num_below),
            widest_rows=tuple(_offsets(offsets.diff().sort(descending=True).values.cpu()) for offsets in rows),
        )

    @property
    def num_levels(self) -> int:
        """``C``, the number of codes of a semantic ID."""
        return len(self.widths)

    @property
    def device(self) -> torch.device:
        """Where the tensors live (``widest_rows`` excepted)."""
        return self.leaf_items.device

    def num_nodes(self, level: int) -> int:
        """``n_l``, the number of distinct prefixes of ``level`` codes (a host integer: no synchronisation)."""
        return len(self.num_items_below[level])

    def to(self, device: torch.device | str) -> "PrefixTrie":
        """The same trie on another device."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device) for tensor in tensors)

        return PrefixTrie(
            widths=self.widths,
            num_items=self.num_items,
            child_offsets=move(self.child_offsets),
            child_tokens=move(self.child_tokens),
            parents=move(self.parents),
            leaf_item_offsets=self.leaf_item_offsets.to(device),
            leaf_items=self.leaf_items.to(device),
            rank_of_item=self.rank_of_item.to(device),
            leaf_of_item=self.leaf_of_item.to(device),
            num_items_below=move(self.num_items_below),
            widest_rows=self.widest_rows,
        )

    def path_of_items(self, items: Tensor) -> Tensor:
        """Node ids from the root to the leaf.

        Args:
            items: ``(n,)`` int64 item indices.

        Returns:
            ``(n, C + 1)`` int64; column ``l`` is a node of level ``l``.

        Raises:
            ValueError: if an index is not an item of this trie.
        """
        self._check_items(items)
        return self.path_of_leaves(self.leaf_of_item.index_select(0, items))

    def codes_of_items(self, items: Tensor) -> Tensor:
        """The semantic IDs ``(n, C)`` int64 of ``items`` ``(n,)``, read back from the trie; errors as ``path_of_items``."""
        path = self.path_of_items(items)
        columns = [tokens.index_select(0, path[:, level + 1]) for level, tokens in enumerate(self.child_tokens)]
        return torch.stack(columns, dim=1)

    def restrict(self, items: Tensor) -> "PrefixTrie":
        """The trie of an allow set; item indices stay those of the whole table.

        Args:
            items: ``(n,)`` int64 item indices in any order, repeats allowed; empty gives a trie without items.

        Raises:
            ValueError: if an index is not an item of this trie.
        """
        kept = torch.unique(items.to(device=self.device, dtype=torch.int64))
        return PrefixTrie._build(self.codes_of_items(kept), kept, self.widths, self.num_items)

    def path_of_leaves(self, leaves: Tensor) -> Tensor:
        """Node ids from the root to each of ``leaves`` ``(n,)`` int64, as ``path_of_items``; unchecked, synchronises nowhere."""
        path = [leaves]
        for parents in reversed(self.parents):
            path.append(parents.index_select(0, path[-1]))
        return torch.stack(path[::-1], dim=1)

    def _check_items(self, items: Tensor) -> None:
        if items.dim() != 1:
            raise ValueError(f"items must have shape (n,), got {tuple(items.shape)}")
        outside = items[(items < 0) | (items >= self.num_items)]
        if len(outside):
            raise ValueError(f"items must be item indices in [0, {self.num_items}), got {outside[0].item()}")
        missing = items[self.leaf_of_item.index_select(0, items) < 0]
        if len(missing):
            raise ValueError(f"items must belong to this restricted trie, got {missing[0].item()}, which is not in its allow set")


def check_codes(codes: Tensor, widths: Sequence[int]) -> None:
    """Refuse a table of codes that is not one.

    Raises:
        ValueError: naming the rule that ``codes`` ``(N, C)`` int64 or ``widths`` breaks.
    """
    if codes.dtype != torch.int64 or codes.dim() != 2:
        raise ValueError(f"codes must be int64 of shape (N, C), got {codes.dtype} of shape {tuple(codes.shape)}")
    if not widths or codes.shape[1] != len(widths) or min(widths) < 1:
        raise ValueError(f"widths must be one positive width per code level, got {tuple(widths)} for {codes.shape[1]} levels")
    bounds = torch.tensor(tuple(widths), device=codes.device)
    rows, levels = ((codes < 0) | (codes >= bounds)).nonzero(as_tuple=True)
    if len(rows):
        row, level = int(rows[0]), int(levels[0])
        raise ValueError(f"codes[{row}, {level}] must lie in [0, {widths[level]}), got {int(codes[row, level])}")


def _offsets(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))
