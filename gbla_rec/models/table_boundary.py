"""The boundary between the tables and the dense part, where a training loop can hold back the gradients of the tables."""

# L tokens (docs/shapes.md)

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn


class HasValues(Protocol):
    """What is needed of TorchRec's ``JaggedTensor``."""

    def values(self) -> Tensor:
        """``(L, dim)``."""


@dataclass(frozen=True)
class CutRows:
    """Rows of one feature beyond the boundary, read like a ``JaggedTensor``."""

    rows: Tensor

    def values(self) -> Tensor:
        """``(L, dim)``."""
        return self.rows


class TableBoundary(nn.Module):
    """Passes embedded rows on; while ``is_cut``, the graph of the dense part ends here.

    The dense part then reads detached rows, and its backward leaves their gradients in ``Cut.inner.grad``. Whoever sets
    ``is_cut`` must run the backward of ``Cut.outer``: until then the tables, which step inside their backward, stay as they are.
    A module of its own, so that TorchRec's pipeline traces around it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_cut = False
        self._cuts: list[Cut] = []

    def forward(self, embedded: Mapping[str, HasValues]) -> Mapping[str, HasValues]:
        """``embedded``: feature name to ``(L, dim)`` rows."""
        if not (self.is_cut and self.training and torch.is_grad_enabled()):
            return embedded
        rows = {name: jagged.values() for name, jagged in embedded.items()}
        self._cuts = [Cut(outer, outer.detach().requires_grad_()) for outer in rows.values()]
        return {name: CutRows(cut.inner) for name, cut in zip(rows, self._cuts, strict=True)}

    def take_cuts(self) -> "list[Cut]":
        """The cuts of the last forward; a second call returns none."""
        cuts, self._cuts = self._cuts, []
        return cuts


@dataclass(frozen=True)
class Cut:
    """Rows on both sides of the boundary, ``(L, dim)`` each: ``outer`` in the graph of the tables, ``inner`` a leaf of the dense part."""

    outer: Tensor
    inner: Tensor
