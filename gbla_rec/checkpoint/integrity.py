"""Whether a checkpoint is what was saved, and of this model; every rank comes to one verdict, so none waits for another."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import Checkpoint, file_digest, readable_checkpoints, size_damage

NAMED_TENSORS = 3
"""So many of the tensors that differ are named in an error."""


def require_intact(checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint whose files are not those that were saved; all ranks call it together and share the reading.

    Raises:
        ValueError: on all ranks; names the file, what is wrong, and another checkpoint of the run that is whole.
    """
    damage = find_damage(checkpoint)
    if damage is None:
        return
    directory = checkpoint.path
    # one list for all ranks: they search it together
    found = on_first_rank(lambda: readable_checkpoints(directory.parent.parent))
    others = [other for other in reversed(found) if other.path != directory]
    whole = next((other for other in others if find_damage(other) is None), None)
    cure = "copy it again: no other checkpoint of the run is whole"
    if whole is not None:
        cure = (
            f"{whole.path.name} is whole: copy this one again, or train with --resume-step {whole.progress.step} to go on from there, "
            f"or remove {directory} to evaluate without it"
        )
    raise ValueError(f"checkpoint {directory} is damaged: {damage}; {cure}")


def find_damage(checkpoint: Checkpoint) -> str | None:
    """What is wrong with the files of a checkpoint, None if nothing; the same on all ranks, which call it together."""
    own: str | None
    try:
        own = _own_share_of_damage(checkpoint)
    except OSError as error:
        own = f"rank {dist.get_rank()} cannot read it ({error})"
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return next((damage for damage in found if damage is not None), None)


def _own_share_of_damage(checkpoint: Checkpoint) -> str | None:
    if damage := size_damage(checkpoint):
        return damage
    wanted = checkpoint.progress.file_digests
    # a checkpoint of an older version has no digests
    for name in sorted(wanted)[dist.get_rank() :: dist.get_world_size()]:
        if file_digest(checkpoint.path / name) != wanted[name]:
            return f"the content of {name} is not what was saved (SHA-256)"
    return None


def require_same_tensors(directory: Path, state: Mapping[str, Any], whole: str) -> None:
    """Refuse a checkpoint of another model before one of its weights is read; all ranks call it together.

    Args:
        directory: the checkpoint, already known to be intact.
        state: what will be read: tensors in nested dictionaries.
        whole: the key of ``state`` whose tensors must be all that the checkpoint has under this key.

    Raises:
        ValueError: on all ranks; names the first tensors that differ, with both shapes.
    """
    saved = FileSystemReader(directory).read_metadata().state_dict_metadata
    wanted = dict(_shapes("", state))
    found = {name: tuple(entry.size) for name, entry in saved.items() if isinstance(entry, TensorStorageMetadata)}
    differing = [
        f"{name} {found.get(name, 'absent')} where {shape} is wanted" for name, shape in wanted.items() if found.get(name) != shape
    ]
    differing += [f"{name} {found[name]} where there is none" for name in found if name.startswith(f"{whole}.") and name not in wanted]
    verdicts: list[list[str]] = [[]] * dist.get_world_size()
    # ranks want different states of the table optimiser, which lie with their shards
    dist.all_gather_object(verdicts, differing[: NAMED_TENSORS + 1])
    differing = list(dict.fromkeys(line for verdict in verdicts for line in verdict))
    if differing:
        more = ", ..." if len(differing) > NAMED_TENSORS else ""
        raise ValueError(
            f"checkpoint {directory} belongs to another model or sharding: it has {', '.join(differing[:NAMED_TENSORS])}{more}; "
            "use the config.json that its run was trained with"
        )


def largest_chunk_bytes(directory: Path) -> int:
    """Bytes of the largest piece that a rank reads at once, as it was written."""
    pieces = FileSystemReader(directory).read_metadata().storage_data or {}
    return max((piece.length for piece in pieces.values()), default=0)


def _shapes(prefix: str, state: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    for key, value in state.items():
        if isinstance(value, Mapping):
            yield from _shapes(f"{prefix}{key}.", value)
        elif isinstance(value, Tensor | ShardedTensor):
            yield f"{prefix}{key}", tuple(value.size())
