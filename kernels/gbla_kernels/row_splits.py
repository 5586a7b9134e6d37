"""How the rows of a jagged batch are cut into the pieces that single programs work on."""

# B rows, L tokens, T tokens of a row, Z splits, G rows with splits (docs/shapes.md)

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TINY_ROW_LIMITS = (16, 32, 64)
"""A row of no more tokens than one of these is done in one block of so many tokens, without a state."""
SHORT_LIMIT = 128
"""A row of no more tokens is done by one program a head, its state never in memory."""
SPLIT = 256
"""Tokens of a split of longer rows, up to ``SHORT_SPLITS_UP_TO``."""
SHORT_SPLITS_UP_TO = 1536
"""Rows up to here are split finely: alone in a batch, they would leave most of the GPU idle otherwise."""
LONG_SPLIT = 512
"""Tokens of a split of longer rows: a state in memory costs as much traffic as about 50 tokens (K = V = 64; 100 where they are 128)."""
LONG_SPLITS_UP_TO = 16_384
"""Rows up to here have splits of ``LONG_SPLIT`` tokens; the splits of longer ones, which fill a GPU all the same, are longer."""
LONGER_SPLIT = 1024
"""Tokens of a split of rows beyond that; more only where that would make over ``MAX_SPLITS`` splits."""
MAX_SPLITS = 64
"""Splits of the longest rows: bounds the work of adding them up."""
SPLIT_MULTIPLE = 128
"""Splits are multiples of this, so that only a row's last block is partly filled."""


def split_lengths(lengths: Tensor) -> Tensor:
    """Tokens per split of rows of ``lengths (B,)``, ``(B,)`` int64.

    A function of the row's own length alone: a row's result does not depend on who shares its batch.
    """
    wanted = (lengths + MAX_SPLITS - 1) // MAX_SPLITS
    longer = ((wanted + SPLIT_MULTIPLE - 1) // SPLIT_MULTIPLE * SPLIT_MULTIPLE).clamp(min=LONGER_SPLIT)
    long = torch.where(lengths <= LONG_SPLITS_UP_TO, LONG_SPLIT, longer)
    return torch.where(lengths <= SHORT_SPLITS_UP_TO, SPLIT, long)


@dataclass(frozen=True, eq=False)
class RowSplits:
    """Rows of at most ``short_limit`` tokens, each done by one program, and the splits of all longer rows.

    Every table has at least two entries, so that a grid is never empty and a compiler, which treats sizes 0 and 1 apart, sees one case:
    an entry with ``start == stop`` means nothing to do.

    Attributes:
        short_rows: ``(S, 2)`` int64: first token and end of each short row.
        class_ends: the rows of at most ``TINY_ROW_LIMITS[i]`` tokens end at entry ``class_ends[i]`` of ``short_rows``, the longer ones
            at ``class_ends[-1]``; None where rows stand in the order of the batch.
        splits: ``(Z, 3)`` int64: slot of the row, first token and end of each split; splits of a row lie side by side.
        slot_offsets: ``(G + 1,)`` int64: splits of slot ``g`` are ``slot_offsets[g]:slot_offsets[g + 1]``. A slot is a
            longer row, of one split or more, counted without the short ones.
        has_short: whether there may be a short row that is not empty.
        has_splits: whether there may be a split.
        most_splits: no row has more splits; a bound where tables are made on the device, as is the next.
        fewest_splits: no row beyond ``short_limit`` has fewer; 0 where none is so long.
    """

    short_rows: Tensor
    splits: Tensor
    slot_offsets: Tensor
    has_short: bool
    has_splits: bool
    class_ends: tuple[int, ...] | None
    most_splits: int
    fewest_splits: int

    @classmethod
    def from_lengths(cls, lengths: Tensor, *, short_limit: int = SHORT_LIMIT) -> "RowSplits":
        """Exact tables on the CPU from ``lengths (B,)`` int64. ``short_limit=0`` splits every row that is not empty."""
        stops = lengths.cumsum(0)
        starts = stops - lengths
        is_short = (lengths > 0) & (lengths <= short_limit)
        classes = torch.bucketize(lengths[is_short], torch.tensor(TINY_ROW_LIMITS))
        class_ends = torch.bincount(classes, minlength=len(TINY_ROW_LIMITS) + 1).cumsum(0)
        short_rows = torch.stack((starts[is_short], stops[is_short]), dim=1)[classes.argsort(stable=True)]
        is_long = lengths > max(short_limit, 0)
        starts, stops, sizes = starts[is_long], stops[is_long], split_lengths(lengths[is_long])
        counts = (stops - starts + sizes - 1) // sizes
        slots = torch.repeat_interleave(counts)
        slot_offsets = torch.zeros(max(len(counts), 2) + 1, dtype=torch.int64)
        slot_offsets[1 : len(counts) + 1] = counts.cumsum(0)
        slot_offsets[len(counts) + 1 :] = counts.sum()
        first = starts[slots] + (torch.arange(len(slots)) - slot_offsets[slots]) * sizes[slots]
        splits = torch.stack((slots, first, torch.minimum(first + sizes[slots], stops[slots])), dim=1)
        has_short, has_splits = len(short_rows) > 0, len(splits) > 0
        tables = (_at_least_two(short_rows), _at_least_two(splits), slot_offsets)
        most, fewest = (int(counts.max()), int(counts.min())) if has_splits else (0, 0)
        return cls(*tables, has_short, has_splits, tuple(class_ends.tolist()), most, fewest)

    @classmethod
    def on_device(cls, offsets: Tensor, num_tokens: int, *, short_limit: int = SHORT_LIMIT) -> "RowSplits":
        """Tables of the largest size that ``num_tokens`` allows, on the device of ``offsets (B + 1,)`` and without a sync.

        At most ``L / (short_limit + 1)`` rows have splits, at most ``L / SPLIT`` of them and one more each.
        """
        # two empty rows more: no size is ever 0 or 1, which a compiler treats apart
        bounds = torch.cat((offsets, offsets[-1:], offsets[-1:]))
        max_slots = min(offsets.numel() + 1, num_tokens // (short_limit + 1) + 2)
        max_splits = num_tokens // SPLIT + max_slots
        is_long = bounds.diff() > short_limit
        short_rows = torch.stack((bounds[:-1], torch.where(is_long, bounds[:-1], bounds[1:])), dim=1)
        # long rows first, in order: their slots
        order = torch.argsort(is_long.logical_not().to(torch.uint8), stable=True)[:max_slots]
        starts, stops = bounds[:-1][order], bounds[1:][order]
        sizes = split_lengths(stops - starts)
        ends = torch.where(is_long[order], (stops - starts + sizes - 1) // sizes, 0).cumsum(0)
        slot_offsets = torch.cat((ends.new_zeros(1), ends))
        index = torch.arange(max_splits, device=offsets.device)
        slots = torch.searchsorted(ends, index, right=True).clamp(max=max_slots - 1)
        first = starts[slots] + (index - slot_offsets[slots]) * sizes[slots]
        last = torch.minimum(first + sizes[slots], stops[slots])
        splits = torch.stack((slots, first, torch.where(index < slot_offsets[-1], last, first)), dim=1)
        # not asked under a compiler, which would make a graph for each answer
        is_traced = torch.compiler.is_compiling()
        has_short = is_traced or (offsets.numel() > 1 and short_limit > 0)
        return cls(short_rows, splits, slot_offsets, has_short, is_traced or num_tokens > short_limit, None, max_splits, 1)

    def map(self, function: Callable[[Tensor], Tensor]) -> "RowSplits":
        """The same tables with ``function`` applied to each tensor."""
        tables = (function(self.short_rows), function(self.splits), function(self.slot_offsets))
        return RowSplits(*tables, self.has_short, self.has_splits, self.class_ends, self.most_splits, self.fewest_splits)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``short_rows``, ``splits``, ``slot_offsets``."""
        return self.short_rows, self.splits, self.slot_offsets


def _at_least_two(table: Tensor) -> Tensor:
    return table if table.shape[0] > 1 else torch.cat((table, table.new_zeros(2 - table.shape[0], table.shape[1])))
