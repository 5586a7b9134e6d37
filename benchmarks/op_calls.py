"""An op on several sets of operands as the calls that ``graph_ms`` replays: forward without gradients, or forward and backward."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from gpu_timing import Call
from torch import Tensor

Op = Callable[..., Tensor]


class Operands(Protocol):
    """What an op is called with."""

    @property
    def leaves(self) -> Sequence[Tensor]:
        """In the order of the op's arguments; all require gradients."""

    @property
    def d_output(self) -> Tensor:
        """Gradient of the output."""


def calls(op: Op, sets: Sequence[Operands], with_backward: bool, *, allow_unused: bool = False) -> list[Call]:
    """One call for each of ``sets``; ``allow_unused`` as ``forward_backward`` has it."""
    return [partial(forward_backward, op, one, allow_unused=allow_unused) if with_backward else partial(forward, op, one) for one in sets]


def forward(op: Op, operands: Operands) -> Tensor:
    with torch.no_grad():
        return op(*operands.leaves)


def forward_backward(op: Op, operands: Operands, *, allow_unused: bool = False) -> list[Tensor | None]:
    """Output and the gradient of every leaf, all detached.

    Args:
        op: the work.
        operands: one set.
        allow_unused: give None for a leaf that the op does not read, in place of an error.
    """
    output = op(*operands.leaves)
    return [output.detach(), *torch.autograd.grad(output, operands.leaves, operands.d_output, allow_unused=allow_unused)]
