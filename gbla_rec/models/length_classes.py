"""Rows of a jagged batch, sorted into a few classes of similar length: one launch each, without many empty blocks.

A kernel over ``rows x longest row`` blocks wastes almost all of them on a batch of 4,096 short rows and a long one.
"""

# B rows, L tokens (docs/shapes.md)

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK = 128
"""Queries of one block of the attention kernels."""
CLASS_RATIO = 4
"""Rows of a class differ at most by this factor in length, unless that would leave few rows to a launch."""
MERGED_BLOCKS = 256
"""A class joins the next longer one if this adds no more empty blocks: about the cost of a launch."""
REUSE_RATIO = 4
"""A class takes a known shape of up to so many times its own blocks: empty ones cost microseconds, a plan a tenth of a second."""


def bucket(size: int) -> int:
    """The next power of two at or above ``size``: few different sizes, few plans."""
    assert size > 0
    return 1 << (size - 1).bit_length()


class KnownShapes:
    """Rows and longest row of the launches that a process has met, so that new batches may take the plans of earlier ones.

    A plan takes about 0.1 s to compile, for which all ranks wait. On Zipf lengths up to 32,768, dealt by cost to four ranks of 65,536
    tokens, the ranks wait for 34 plans in the first 144 steps, and for 66 if every shape gets its own; blocks grow by 30 %.
    """

    def __init__(self) -> None:
        self._shapes = list[tuple[int, int]]()

    def fit(self, num_rows: int, max_length: int) -> tuple[int, int]:
        """The smallest known shape that holds this one, if it has few enough blocks more; else this one, known from now on."""
        fitting = [
            (rows * length, rows, length)
            for rows, length in self._shapes
            if rows >= num_rows and length >= max_length and rows * length <= REUSE_RATIO * num_rows * max_length
        ]
        if fitting:
            return min(fitting)[1:]
        self._shapes.append((num_rows, max_length))
        return num_rows, max_length


_KNOWN_SHAPES = KnownShapes()


@dataclass(frozen=True, slots=True)
class LengthClass:
    """The rows of more than ``above`` tokens and at most ``longest``."""

    above: int
    longest: int
    num_rows: int


def length_classes(lengths: Tensor) -> list[LengthClass]:
    """The classes of ``lengths (B,)`` on the CPU, longest first; empty rows belong to none."""
    lengths = lengths[lengths > 0].sort(descending=True).values
    if len(lengths) == 0:
        return []
    limits = [BLOCK]
    while limits[-1] < int(lengths[0]):
        limits.append(CLASS_RATIO * limits[-1])
    # rows longer than each limit, then all rows
    counts = [*(int((lengths > limit).sum()) for limit in reversed(limits)), len(lengths)]
    groups = [(start, stop) for start, stop in pairwise(counts) if stop > start]
    merged = groups[:1]
    for start, stop in groups[1:]:
        longer, shorter = (-(-bucket(int(lengths[first])) // BLOCK) for first in (merged[-1][0], start))
        if (stop - start) * (longer - min(shorter, longer)) <= MERGED_BLOCKS:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    classes = []
    for start, stop in merged:
        above = int(lengths[stop]) if stop < len(lengths) else 0
        classes.append(LengthClass(above, int(lengths[start]), stop - start))
    return classes


@dataclass(frozen=True, slots=True, eq=False)
class ClassRows:
    """The rows of one class on the device, padded with empty ones to a bucket of their number.

    Attributes:
        starts: ``(n + 1,)`` int64: first token of each row; the last entry is ``L``.
        lengths: ``(n,)`` int32, 0 for padding.
        max_length: a power of two at or above the longest row, at least ``BLOCK``; with ``n`` one of the ``KnownShapes``.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    _offsets: dict[int, Tensor] = field(default_factory=dict)

    @property
    def num_rows(self) -> int:
        """``n``, a bucket."""
        return self.lengths.numel()

    def offsets(self, stride: int) -> Tensor:
        """``starts`` in elements, for tokens that are ``stride`` apart."""
        if stride in self._offsets:
            return self._offsets[stride]
        offsets = self.starts * stride
        if not _is_capturing(offsets):
            self._offsets[stride] = offsets
        return offsets


_CACHE: Any = WeakTensorKeyDictionary()


def class_rows(offsets: Tensor, offsets_cpu: Tensor) -> list[ClassRows]:
    """The classes of a batch with ``offsets (B + 1,)`` int64 on the device and on the CPU, without a synchronisation.

    Made once per batch, device and stream: they live as long as ``offsets_cpu``, which all layers share. A CUDA graph reads those
    made before its capture, so its owner keeps the batch's layout.
    """
    stream = torch.cuda.current_stream(offsets.device).cuda_stream if offsets.is_cuda else 0
    places = _CACHE.setdefault(offsets_cpu, {}).setdefault(offsets.device, {})
    if stream in places:
        return places[stream]  # type: ignore[no-any-return]
    is_capturing = _is_capturing(offsets)
    if is_capturing and places:
        # complete by now: a capture begins with a synchronisation
        return next(iter(places.values()))
    classes = length_classes(offsets_cpu.diff())
    made = [_rows_of(one, offsets, num_classes=len(classes)) for one in classes]
    if not is_capturing:
        places[stream] = made
    return made


def _is_capturing(tensor: Tensor) -> bool:
    """True inside a CUDA graph: what it computes is there only after a replay, and must not be kept for other calls."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _rows_of(one: LengthClass, offsets: Tensor, *, num_classes: int) -> ClassRows:
    num_rows, max_length = bucket(one.num_rows), max(bucket(one.longest), BLOCK)
    # what a kernel computes may depend on its shape to the last bit, and a resumed process has met others
    if not torch.are_deterministic_algorithms_enabled():
        num_rows, max_length = _KNOWN_SHAPES.fit(num_rows, max_length)
    lengths = offsets.diff()
    if num_classes > 1 or one.num_rows < lengths.numel():
        is_inside = (lengths > one.above) & (lengths <= one.longest)
        # the rows of the class first, in order
        order = torch.argsort(is_inside.logical_not().to(torch.uint8), stable=True)[: one.num_rows]
        starts, lengths = offsets[:-1][order], lengths[order]
    else:
        starts = offsets[:-1]
    padding = num_rows - one.num_rows
    starts = torch.cat((starts, offsets[-1:].expand(padding + 1)))
    lengths = torch.nn.functional.pad(lengths.to(torch.int32), (0, padding))
    return ClassRows(starts, lengths, max_length)
