"""The ranks of a run: gloo on CPU, NCCL on GPU, and one process alone without a launcher."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from gbla_rec.checkpoint.rank_failure import explain, require_restartable

ResultT = TypeVar("ResultT")
TIMEOUT = timedelta(minutes=30)
"""Other ranks wait this long, for example while rank 0 ranks with the baselines."""


@contextmanager
def process_group(timeout: timedelta = TIMEOUT) -> Iterator[torch.device]:
    """Join the launcher's process group (``torchrun``'s variables), or make a group of one; yields this rank's device.

    A group that already exists is used and left alone. A rank that leaves with an error leaves the group as it is: to
    destroy it can wait for ranks that wait for this one. Its process must then end at once (``gbla_apps.command_line`` does),
    which tells the launcher and the other ranks.

    Raises:
        ValueError: if the launcher would restart ranks in a way that fails.
        LostRankError: if a collective failed because another rank is gone.
    """
    device = local_device()
    if dist.is_initialized():
        yield device
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as directory:
        if "WORLD_SIZE" in os.environ:
            require_restartable()
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.FileStore(str(Path(directory, "store")), 1)
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        try:
            yield device
        except SystemExit:
            # all ranks agreed to end
            dist.destroy_process_group()
            raise
        except BaseException as error:
            if dist.get_world_size() == 1:
                dist.destroy_process_group()
                raise
            shown = explain(error)
            raise shown from (None if shown is error else error)
        dist.destroy_process_group()


def require_process_group(caller: str) -> None:
    """Raise RuntimeError unless this process has joined a group; the sharded tables need one, also of one process."""
    if not dist.is_initialized():
        raise RuntimeError(
            f"{caller} needs a process group: call it within `with gbla_rec.checkpoint.process_group.process_group() as device:`"
        )


def local_device() -> torch.device:
    """This rank's GPU, or the CPU when there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device


def on_first_rank(action: Callable[[], ResultT], group: dist.ProcessGroup | None = None) -> ResultT:
    """Run ``action`` on rank 0 and give every rank its result, through ``group`` (default: the group of all ranks).

    Raises:
        Exception: what ``action`` raised, on every rank: an error on rank 0 alone would hang the others.
    """
    outcome: list[tuple[ResultT | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0, group=group)
    result, raised = outcome[0]
    if raised is not None:
        raise raised
    return cast(ResultT, result)
