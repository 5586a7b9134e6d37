"""Gradient accumulation inside a pipeline that steps after every backward: the dense part steps after the last micro batch only.

The loss of each micro batch is weighted by the targets of the whole step, so the gradients that add up are those of one big
batch. The fused tables cannot wait: TorchRec updates them inside each backward, with the gradient of that micro batch. With N
micro batches row-wise Adagrad thus makes N small steps, each on the micro batch's share of the gradient, and a row that occurs in
several of them is read as updated by the earlier ones.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DistributedModelParallel

from gbla_rec.training.dense_optimizer import DenseOptimizer


class AccumulatingOptimizer:
    """What TorchRec's train pipeline needs of an optimiser; every ``num_micro_batches``-th call reaches the inner one.

    ``zero_grad`` passes on the first call of each group, ``step`` on the last one.
    """

    def __init__(self, optimizer: DenseOptimizer, num_micro_batches: int) -> None:
        self.optimizer, self.num_micro_batches = optimizer, num_micro_batches
        self._num_zeroed = self._num_stepped = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients before the first micro batch of a step."""
        if self._num_zeroed % self.num_micro_batches == 0:
            self.optimizer.zero_grad(set_to_none)
        self._num_zeroed += 1

    def step(self, closure: None = None) -> None:
        """Step after the last micro batch of a step."""
        self._num_stepped += 1
        if self._num_stepped % self.num_micro_batches == 0:
            self.optimizer.step()


def gradient_sync(model: DistributedModelParallel, num_micro_batches: int) -> Callable[[], AbstractContextManager[None]]:
    """A context for each forward in turn, in which DDP prepares an all-reduce for the last micro batch of each step only."""
    parallel = data_parallel(model)
    num_calls = 0

    def context() -> AbstractContextManager[None]:
        nonlocal num_calls
        num_calls += 1
        is_last = num_calls % num_micro_batches == 0
        return nullcontext() if is_last or parallel is None else _no_sync(parallel)

    return context


@contextmanager
def _no_sync(parallel: DistributedDataParallel) -> Iterator[None]:
    with parallel.no_sync():
        yield


def data_parallel(model: DistributedModelParallel) -> DistributedDataParallel | None:
    """The wrapper that all-reduces the dense gradients; None where every parameter is in sharded tables."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)
