"""Save and load through torch.distributed.checkpoint: written by N ranks, read by M."""

import shutil
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torchrec.distributed.model_parallel import DistributedModelParallel

from gbla_rec.checkpoint.integrity import largest_chunk_bytes, require_intact, require_same_tensors
from gbla_rec.checkpoint.memory import require_host_memory
from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import (
    TEMPORARY_PREFIX,
    Checkpoint,
    Progress,
    checkpoint_path,
    file_digest,
    file_sizes,
    flush_names,
    write_progress,
)

MODEL = "model"
TABLE_OPTIMIZER = "table_optimizer"
DENSE_OPTIMIZER = "dense_optimizer"


def save_checkpoint(run_dir: Path, model: DistributedModelParallel, dense_optimizer_state: dict[str, Any], progress: Progress) -> Path:
    """Write a checkpoint; all ranks call it together.

    It is written under a temporary name and renamed when complete, so a killed save leaves the older ones as they are.

    Args:
        run_dir: the run.
        model: tables, dense part, and the fused optimiser of the tables.
        dense_optimizer_state: tensors by name; replicated on all ranks.
        progress: stored beside it; its step names the directory.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: on all ranks if one cannot write, for want of room for example; older checkpoints are as they were.
    """
    return write_checkpoint(run_dir, checkpoint_state(model, dense_optimizer_state), progress)


def write_checkpoint(run_dir: Path, state: dict[str, Any], progress: Progress, group: dist.ProcessGroup | None = None) -> Path:
    """The work of ``save_checkpoint`` on a state of ``checkpoint_state``; ``group`` (default: all ranks) is that of its collectives."""
    final = checkpoint_path(run_dir, progress.step)
    temporary = final.with_name(TEMPORARY_PREFIX + final.name)
    outdated = final.with_name(f"{TEMPORARY_PREFIX}old-{final.name}")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(outdated, ignore_errors=True)

    def publish() -> None:
        write_progress(temporary, replace(progress, file_sizes=file_sizes(temporary), file_digests=digests))
        flush_names(temporary)
        if final.exists():
            # moved, then deleted: what is deleted half way must not look complete
            final.rename(outdated)
        try:
            temporary.rename(final)
        except OSError:
            if outdated.exists():
                outdated.rename(final)
            raise
        flush_names(final.parent)
        shutil.rmtree(outdated, ignore_errors=True)

    on_first_rank(prepare, group)
    try:
        dcp.save(state, checkpoint_id=temporary, process_group=group)
        digests = _digests(temporary, group)
        on_first_rank(publish, group)
    except (CheckpointException, OSError) as error:
        # a full disk shows as an error of torch's file format, and the half-written files are about to make room
        room = on_first_rank(lambda: _room(final.parent), group)
        on_first_rank(prepare, group)
        raise OSError(
            f"checkpoint {final} could not be saved: {_cause(error)}; {room}; make room, then train with --resume: "
            "older checkpoints are as they were"
        ) from error
    return final


def load_checkpoint(checkpoint: Checkpoint, model: DistributedModelParallel, dense_optimizer_state: dict[str, Any] | None) -> None:
    """Read a checkpoint into ``model``, whatever number of ranks wrote it; all ranks call it together.

    Args:
        checkpoint: what to read.
        model: overwritten in place.
        dense_optimizer_state: tensors by name, overwritten in place; None reads the weights alone (evaluation).

    Raises:
        ValueError: on all ranks if a file is damaged, missing or too many, or the checkpoint belongs to another model; names the
            checkpoint, what is wrong and the cure; or if a host has no memory for a piece of it.
        OSError: on all ranks if a file of it cannot be read.
    """
    require_intact(checkpoint)
    state: dict[str, Any] = {MODEL: model.state_dict()} if dense_optimizer_state is None else checkpoint_state(model, dense_optimizer_state)
    require_same_tensors(checkpoint.path, state, whole=MODEL)
    require_host_memory(largest_chunk_bytes(checkpoint.path), f"to read the largest piece of {checkpoint.path}")
    try:
        dcp.load(state, checkpoint_id=checkpoint.path)
    except CheckpointException as error:
        raise OSError(f"checkpoint {checkpoint.path} cannot be read: {_cause(error)}") from error
    model.load_state_dict(OrderedDict(state[MODEL]))
    if dense_optimizer_state is not None:
        if TABLE_OPTIMIZER in state:
            model.fused_optimizer.load_state_dict(state[TABLE_OPTIMIZER])
    dist.barrier()


def _room(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:,.1f} MiB were free on the disk"
    except OSError as error:
        return f"its disk cannot be asked for its room: {error}"


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in sorted(error.failures.items()))
    return str(error)


def _digests(directory: Path, group: dist.ProcessGroup | None = None) -> dict[str, str]:
    """Digests of all files of a checkpoint, on every rank; each rank reads its share, and all raise if one cannot."""
    # one listing for all: a shared file system may show ranks different ones, and no file may go unread
    names = on_first_rank(lambda: list(file_sizes(directory)), group)
    own: dict[str, str] | OSError
    try:
        own = {name: file_digest(directory / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    except OSError as error:
        own = error
    shares: list[dict[str, str] | OSError] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, own, group=group)
    digests: dict[str, str] = {}
    for share in shares:
        if isinstance(share, OSError):
            raise share
        digests |= share
    return digests


def checkpoint_state(model: DistributedModelParallel, dense_optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, by name; shares its memory with the model."""
    return {
        MODEL: model.state_dict(),
        DENSE_OPTIMIZER: dense_optimizer_state,
        # a rank without a table has an empty state, which a checkpoint cannot name
        **({TABLE_OPTIMIZER: table_state} if (table_state := model.fused_optimizer.state_dict())["state"] else {}),
    }
