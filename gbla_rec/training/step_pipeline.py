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

Forward = Callable[[Batch | None], tuple[Tensor, Tensor]]
"""From a batch on the device to its loss (scalar) and the NLL of its targets ``(S,)``."""


def train_steps(
    model: DistributedModelParallel, optimizer: DenseOptimizer, device: torch.device, forward: Forward, batches: Iterator[Batch]
) -> Iterator[tuple[Batch, Tensor]]:
    """Train one step on each batch; yields the batch and the NLL of its targets after its step.

    Nothing is in flight before the first and after the last, so the model can then be read and saved.
    """
    in_flight: deque[Batch] = deque()
    remembered = _remember(batches, in_flight)
    # the pipeline asks for zero_grad and step only
    stepper = cast(torch.optim.Optimizer, optimizer)
    pipeline: TrainPipelineSparseDist[Batch, Tensor] = TrainPipelineSparseDist(model, stepper, device, custom_model_fwd=forward)
    while True:
        try:
            nll = pipeline.progress(remembered)
        except StopIteration:
            break
        yield in_flight.popleft(), nll
    pipeline.detach()


def _remember(batches: Iterator[Batch], in_flight: deque[Batch]) -> Iterator[Batch]:
    """Pass batches on and keep them in order: the pipeline takes them some steps before it trains on them."""
    for batch in batches:
        in_flight.append(batch)
        yield batch
