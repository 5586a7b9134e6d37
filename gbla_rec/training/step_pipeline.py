"""Optimiser steps through TorchRec's pipeline, which copies and exchanges the next batches while it trains on this one."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from gbla_rec.data.batch import Batch
from gbla_rec.training.dense_optimizer import DenseOptimizer
from gbla_rec.training.gradient_accumulation import AccumulatingOptimizer, gradient_sync

Forward = Callable[[Batch | None], tuple[Tensor, Tensor]]
"""From a batch on the device to its loss (scalar) and the NLL of its targets ``(S,)``."""


def train_steps(
    model: DistributedModelParallel,
    optimizer: DenseOptimizer,
    device: torch.device,
    forward: Forward,
    steps: Iterator[list[Batch]],
    num_micro_batches: int,
) -> Iterator[tuple[list[Batch], Tensor]]:
    """Train one optimiser step on the micro batches of each global batch.

    Nothing is in flight before the first step and after the last, so the model can then be read and saved.

    Args:
        model: the sharded model, in training mode.
        optimizer: of the dense part; the tables step inside backward.
        device: of this rank.
        forward: from a batch to loss and NLL.
        steps: ``num_micro_batches`` batches each.
        num_micro_batches: backward passes of a step.

    Yields:
        The micro batches of each step (on the host) and the NLL of all targets of this rank, ``(S,)``, after the step.
    """
    in_flight: deque[Batch] = deque()
    micro_batches = _remember(steps, in_flight, num_micro_batches)
    sync = gradient_sync(model, num_micro_batches)

    def accumulate(batch: Batch | None) -> tuple[Tensor, Tensor]:
        with sync():
            return forward(batch)

    # the pipeline asks for zero_grad and step only
    stepper = cast(torch.optim.Optimizer, AccumulatingOptimizer(optimizer, num_micro_batches))
    pipeline: TrainPipelineSparseDist[Batch, Tensor] = TrainPipelineSparseDist(model, stepper, device, custom_model_fwd=accumulate)
    try:
        while True:
            try:
                nll = [pipeline.progress(micro_batches) for _ in range(num_micro_batches)]
            except StopIteration:
                break
            yield [in_flight.popleft() for _ in range(num_micro_batches)], torch.cat(nll)
    finally:
        pipeline.detach()


def _remember(steps: Iterator[list[Batch]], in_flight: deque[Batch], num_micro_batches: int) -> Iterator[Batch]:
    """Pass micro batches on and keep them in order: the pipeline takes them some steps before it trains on them."""
    for step in steps:
        assert len(step) == num_micro_batches
        for batch in step:
            in_flight.append(batch)
            yield batch
