"""Keeps a step that is not finite out of tables and dense weights; decided on the device, and read by the host only at reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gbla_rec.data.histories import StreamPosition
from gbla_rec.models.table_boundary import Cut, TableBoundary


@dataclass(frozen=True)
class WatchedStep:
    """A step that the device has judged and the host has not yet asked about; ``position`` is where its batch starts."""

    step: int
    position: StreamPosition


@dataclass(frozen=True)
class BadStep:
    """The first step that was not finite, and what this rank saw in it."""

    step: int
    position: StreamPosition
    loss: float
    dense_gradient_norm: float
    table_gradient_norm: float


class StepGuard:
    """Judges each backward pass before the fused tables step in it.

    A pass is bad when, on any rank, the loss, the norm of the dense gradients or the norm of the gradients of the embedded rows
    is not finite (fp32 norms: above 1e19 their squares overflow, which counts). The ranks agree by an all-reduce of one number.
    A bad pass sends zeros to the tables, which row-wise Adagrad takes as no step, and has the dense optimiser skip. So does
    every pass after it: weights, moments and step counts stay those before the first bad one until the run stops.

    ::

        tables -> rows | detached rows -> dense part -> loss -> guard.protect(loss)
        backward: dense part (DDP reduces) -> judge -> rows' gradients, or zeros -> tables step
    """

    def __init__(self, boundary: TableBoundary, dense_parameters: Iterable[Tensor], device: torch.device) -> None:
        """Cut the graph at ``boundary`` from now on; ``protect`` must then be called on each loss."""
        boundary.is_cut = True
        self._boundary, self._dense_parameters = boundary, list(dense_parameters)
        self.is_bad = torch.zeros((), device=device)
        """1 from the first bad pass on, else 0; fp32 on the device."""
        self._num_good = torch.zeros((), dtype=torch.int64, device=device)
        # of the last judged pass, or of the first bad one: loss, norm of dense gradients, norm of table gradients
        self._seen = torch.zeros(3, device=device)
        self._watched: list[WatchedStep] = []

    def protect(self, loss: Tensor) -> Tensor:
        """The same loss (scalar), whose backward is judged; call it once after each training forward."""
        cuts = self._boundary.take_cuts()
        if not loss.requires_grad:
            return loss
        pass_ = _Pass(self, loss, cuts)
        protected: Tensor = _JudgedBackward.apply(pass_, *(cut.outer for cut in cuts))  # type: ignore[no-untyped-call]
        return protected

    def watch(self, step: int, position: StreamPosition) -> None:
        """Remember which batch the newest judged pass was about; once for each pass."""
        self._watched.append(WatchedStep(step, position))

    def first_bad_step(self) -> BadStep | None:
        """The first bad one of the passes watched since the last call, the same on all ranks; waits for the device."""
        watched, self._watched = self._watched, []
        if not watched:
            return None
        num_good = int(self._num_good)
        self._num_good.zero_()
        if num_good >= len(watched):
            return None
        bad = watched[num_good]
        loss, dense, table = self._seen.tolist()
        return BadStep(bad.step, bad.position, loss, dense, table)

    @torch.no_grad()
    def _judge(self, loss: Tensor, table_gradients: list[Tensor]) -> None:
        dense_gradients = [parameter.grad for parameter in self._dense_parameters if parameter.grad is not None]
        seen = torch.stack([loss.float(), self._norm(dense_gradients), self._norm(table_gradients)])
        # 0 for finite numbers, else NaN: a sum over ranks keeps a NaN, a maximum may not
        blemish = (seen * 0).sum()
        dist.all_reduce(blemish)
        self._seen.copy_(torch.where(self.is_bad > 0, self._seen, seen))
        self.is_bad.copy_(torch.maximum(self.is_bad, (blemish != 0).float()))
        self._num_good += self.is_bad == 0

    def _norm(self, tensors: list[Tensor]) -> Tensor:
        return torch.nn.utils.get_total_norm(tensors).float() if tensors else self.is_bad.new_zeros(())


@dataclass(frozen=True)
class _Pass:
    guard: StepGuard
    loss: Tensor
    cuts: list[Cut]


class _JudgedBackward(torch.autograd.Function):
    """Joins the two graphs: its backward runs that of the dense part, judges, and hands gradients to the tables."""

    @staticmethod
    def forward(ctx: Any, pass_: _Pass, *rows: Tensor) -> Tensor:
        ctx.pass_ = pass_
        return pass_.loss.detach().clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        pass_: _Pass = ctx.pass_
        # returns when DDP has reduced: the dense gradients are the same on all ranks
        torch.autograd.backward(pass_.loss, gradient)
        inner = [cut.inner.grad if cut.inner.grad is not None else torch.zeros_like(cut.inner) for cut in pass_.cuts]
        pass_.guard._judge(pass_.loss, inner)
        is_bad = pass_.guard.is_bad > 0
        return None, *(rows.masked_fill_(is_bad, 0.0) for rows in inner)
