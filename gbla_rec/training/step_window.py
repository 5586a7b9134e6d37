"""What the steps since the last report add up to, and the rates that follow."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from gbla_rec.config import ModelConfig
from gbla_rec.data.batch import Batch
from gbla_rec.training.model_flops import batch_sizes, peak_flops, training_flops


@dataclass(frozen=True, slots=True)
class Rates:
    """A report, over all ranks.

    Attributes:
        loss: mean NLL in nats per target.
        step_seconds: wall-clock time of a step.
        tokens_per_second: history events.
        data_wait: fraction of the time that the ranks waited for batches.
        mfu: model FLOPs / (time x peak of all devices); None where the device's peak is not known.
    """

    loss: float
    step_seconds: float
    tokens_per_second: float
    data_wait: float
    mfu: float | None


@dataclass
class StepWindow:
    """Sums since the last report; the NLL stays on the device until then."""

    nll: Tensor
    """fp32 scalar, in nats, of this rank's targets."""
    seconds_waited_before: float
    """What the prefetcher had waited when the window began."""
    steps: int = 0
    targets: int = 0
    tokens: int = 0
    flops: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, micro_batches: Sequence[Batch], nll: Tensor, model: ModelConfig, widths: tuple[int, ...]) -> None:
        """Count one step: its micro batches on this rank, and the NLL ``(S,)`` of their targets."""
        self.nll += nll.sum()
        self.steps += 1
        self.targets += micro_batches[0].num_global_targets
        self.tokens += micro_batches[0].num_global_tokens
        for batch in micro_batches:
            queries = batch.queries
            sizes = batch_sizes(
                batch.layout,
                batch.code_layout,
                batch.targets.numel(),
                model.encoder.window,
                num_queries=0 if queries is None else queries.positions.numel(),
                num_candidates=0 if queries is None else queries.candidates.numel(),
                num_scores=0 if queries is None else queries.num_scores(model.item_head.loss),
            )
            self.flops += training_flops(model, widths, sizes)

    def rates(self, seconds_waited: float) -> Rates:
        """What all ranks report; all call it together, and the host waits for the device."""
        waited = seconds_waited - self.seconds_waited_before
        totals = torch.tensor([0.0, self.flops, waited], dtype=torch.float64, device=self.nll.device)
        totals[0] = self.nll
        dist.all_reduce(totals)
        nll, flops, waited = totals.tolist()
        seconds = time.monotonic() - self.started
        peak, world_size = peak_flops(self.nll.device), dist.get_world_size()
        return Rates(
            loss=nll / max(self.targets, 1),
            step_seconds=seconds / max(self.steps, 1),
            tokens_per_second=self.tokens / seconds,
            data_wait=waited / (world_size * seconds),
            mfu=None if peak is None else flops / (world_size * seconds * peak),
        )

    def after(self, seconds_waited: float) -> "StepWindow":
        """The window that begins now."""
        return StepWindow(torch.zeros_like(self.nll), seconds_waited)
