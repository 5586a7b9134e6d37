"""Saves while training goes on: a copy in host memory at the step, then the ordinary save in a thread."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed._shard.sharded_tensor.api import ShardedTensorBase
from torchrec.distributed.model_parallel import DistributedModelParallel

from gbla_rec.checkpoint.process_group import TIMEOUT, on_first_rank
from gbla_rec.checkpoint.run_directory import Progress
from gbla_rec.checkpoint.storage import checkpoint_state, write_checkpoint

logger = logging.getLogger(__name__)


class BackgroundSaver:
    """Writes one checkpoint at a time in a thread; ``with`` waits for the last one.

    All ranks make it together and call ``save`` and ``wait`` in the same order. The thread's collectives have a gloo group of
    their own: in that of training they would mix with the collectives of a step.
    """

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="save")
        self._host_copy = HostCopy()
        self._pending: Future[None] | None = None
        self.given_up: Future[None] | None = None
        """A save that ``with`` left without waiting for it; it goes on as long as it can."""

    def __enter__(self) -> "BackgroundSaver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None or isinstance(error, SystemExit):
            self.wait()
        elif isinstance(error, FloatingPointError) or dist.get_world_size() == 1:
            # all ranks stop with this error, so all can wait; what it says comes first
            try:
                self.wait()
            except OSError as failure:
                logger.warning("%s", failure)
        elif self._pending is not None and not self._pending.done():
            logger.warning("a checkpoint that was being saved in the background is given up: this rank cannot wait for the others")
            self.given_up = self._pending
        self._thread.shutdown(wait=False)

    def save(
        self,
        run_dir: Path,
        model: DistributedModelParallel,
        dense_optimizer_state: dict[str, Any],
        progress: Progress,
        and_then: Callable[[], None],
    ) -> None:
        """Copy the state to host memory and return; the thread does what ``save_checkpoint`` does.

        Args:
            run_dir: as for ``save_checkpoint``, like the next three.
            model: may change as soon as this returns.
            dense_optimizer_state: likewise.
            progress: stored beside it.
            and_then: runs on the first rank once the checkpoint is complete.

        Raises:
            OSError: on all ranks, if the save before this one failed.
        """
        self.wait()
        state = self._host_copy(checkpoint_state(model, dense_optimizer_state))
        self._pending = self._thread.submit(self._write, run_dir, state, progress, and_then)

    def wait(self) -> None:
        """Return when nothing is pending any more.

        Raises:
            OSError: on all ranks, if the pending save failed; the message is that of ``save_checkpoint``.
        """
        pending = self._pending
        if pending is None:
            return
        try:
            pending.result()
        finally:
            # not where Ctrl-C ends the wait alone: who leaves "with" must know of the save
            if pending.done():
                self._pending = None

    def _write(self, run_dir: Path, state: dict[str, Any], progress: Progress, and_then: Callable[[], None]) -> None:
        write_checkpoint(run_dir, state, progress, self._group)
        on_first_rank(and_then, self._group)


class HostCopy:
    """Copies a state to host memory, page-locked when it comes from a GPU; the next copy goes into the same memory.

    Not one of the stagers of torch.distributed.checkpoint: they refuse ShardedTensors, or leave them shared with the model.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def __call__(self, state: dict[str, Any]) -> dict[str, Any]:
        """The same tree of dicts and lists with tensors and shards copied; other leaves are passed on.

        Raises:
            NotImplementedError: for a kind of tensor that is neither plain nor a ShardedTensor.
        """
        copied: dict[str, Any] = self._copy("", state)
        if torch.cuda.is_available():
            # the copies are queued: the step after this one must not overtake them
            torch.cuda.current_stream().synchronize()
        return copied

    def _copy(self, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: self._copy(f"{key}/{name}", item) for name, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(f"{key}/{i}", item) for i, item in enumerate(value))
        if isinstance(value, ShardedTensor):
            shards = [
                Shard(self._buffer(f"{key}/{i}", shard.tensor), _on_host(shard.metadata)) for i, shard in enumerate(value.local_shards())
            ]
            whole = value.metadata()
            placed = replace(whole, shards_metadata=[_on_host(shard) for shard in whole.shards_metadata])
            return ShardedTensorBase._init_from_local_shards_and_global_metadata(shards, placed)
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter):
                raise NotImplementedError(f"state must hold plain tensors and ShardedTensors, got {type(value).__name__} for {key}")
            return self._buffer(key, value)
        return value

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def _on_host(shard: ShardMetadata) -> ShardMetadata:
    """The same shard in the host memory of its rank."""
    rank = shard.placement.rank() if shard.placement is not None else None
    assert rank is not None
    return ShardMetadata(shard_offsets=list(shard.shard_offsets), shard_sizes=list(shard.shard_sizes), placement=f"rank:{rank}/cpu")
