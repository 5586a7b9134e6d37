"""Whether a sharding plan fits into the memory that the ranks have; asked before the tables are allocated."""

import math
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.types import ShardingPlan

from gbla_rec.checkpoint.host_memory import available_host_bytes
from gbla_rec.checkpoint.shard_size import moment_bytes, row_bytes
from gbla_rec.config import exact_bytes

SMALLER_DENSE = "use a smaller dense part: --model.encoder.model-dim"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryBalance:
    """What one rank needs beyond what it holds, and what there is; bytes. Ranks of one host share its ``host_available``."""

    host: str
    device_needed: int
    device_available: int | None
    """None without a GPU: the tables lie in host memory."""
    host_needed: int
    host_available: int


def require_memory(plan: ShardingPlan, dense: nn.Module, device: torch.device, cache_load_factor: float) -> None:
    """Refuse a plan that does not fit, before anything of it is allocated; all ranks call it together.

    Counted are the tables, one moment per row of a shard (row-wise Adagrad), and gradient buckets of the dense part, which is
    on its device already. Activations come on top.

    Args:
        plan: shards and their ranks.
        dense: the part that every rank has whole.
        device: of this rank.
        cache_load_factor: the part of a ``uvm_caching`` shard that its cache on the device holds.

    Raises:
        ValueError: on all ranks; states the bytes that a rank needs and has, and how many ranks or hosts would do.
    """
    dense_bytes = sum(parameter.numel() * parameter.element_size() for parameter in dense.parameters())
    on_device, on_host = shard_bytes(plan, dist.get_rank(), device.type, cache_load_factor)
    is_cuda = device.type == "cuda"
    own = MemoryBalance(
        host=socket.gethostname(),
        device_needed=on_device + dense_bytes if is_cuda else 0,
        device_available=_free_device_bytes(device) if is_cuda else None,
        host_needed=on_host if is_cuda else on_host + dense_bytes,
        host_available=available_host_bytes(),
    )
    ranks: list[MemoryBalance] = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    if obstacle := find_obstacle(ranks, dense_bytes):
        raise ValueError(obstacle)


def require_host_memory(needed: int, purpose: str) -> None:
    """Refuse to go on where a host cannot hold ``needed`` bytes more for each of its ranks; all ranks call it together.

    Raises:
        ValueError: on all ranks; states both numbers.
    """
    own = (socket.gethostname(), needed, available_host_bytes())
    ranks = [own] * dist.get_world_size()
    dist.all_gather_object(ranks, own)
    for rank, (host, _, available) in enumerate(ranks):
        together = sum(bytes_ for name, bytes_, _ in ranks if name == host)
        if together > available:
            count = sum(name == host for name, _, _ in ranks)
            raise ValueError(
                f"rank {rank} needs {exact_bytes(ranks[rank][1])} of host memory {purpose}, and has {exact_bytes(available // count)} "
                f"({exact_bytes(available)} available to the {count} rank(s) of host {host}); start fewer ranks on a host, on more hosts"
            )


def _free_device_bytes(device: torch.device) -> int:
    """What the device has free, and what torch holds of it for tensors to come."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def shard_bytes(plan: ShardingPlan, rank: int, device_type: str, cache_load_factor: float) -> tuple[int, int]:
    """Bytes of the shards of ``rank`` and of their optimiser's moments: on its device, caches included, and in host memory."""
    on_device = on_host = 0
    for kernel, owner, rows, columns in _shards(plan):
        if owner == rank:
            size = row_bytes(rows, columns) + moment_bytes(rows)
            if device_type == "cuda" and "uvm" not in kernel:
                on_device += size
            else:
                on_host += size
                if kernel.endswith("uvm_caching"):
                    on_device += int(cache_load_factor * size)
    return on_device, on_host


def _shards(plan: ShardingPlan) -> Iterator[tuple[str, int, int, int]]:
    """Kernel, rank, rows and columns of every shard."""
    for module_plan in plan.plan.values():
        for sharding in module_plan.values():  # type: ignore[attr-defined]
            assert isinstance(sharding.sharding_spec, EnumerableShardingSpec)
            for shard in sharding.sharding_spec.shards:
                rows, columns = shard.shard_sizes
                owner = shard.placement.rank() if shard.placement is not None else None
                assert owner is not None
                yield sharding.compute_kernel, owner, rows, columns


def find_obstacle(ranks: list[MemoryBalance], dense_bytes: int) -> str | None:
    """The first rank that does not fit, in words, with its cure; None if all fit."""
    for rank, own in enumerate(ranks):
        if own.device_available is not None and own.device_needed > own.device_available:
            total = sum(other.device_needed - dense_bytes for other in ranks)
            enough = _enough(total, own.device_available - dense_bytes)
            cure = SMALLER_DENSE if enough is None else f"start at least {enough} ranks, a GPU of this size each"
            return _obstacle(rank, own.device_needed, own.device_available, "device memory", "", cure, enough, len(ranks))
        neighbours = [other for other in ranks if other.host == own.host]
        if sum(other.host_needed for other in neighbours) > own.host_available:
            replicated = 0 if own.device_available is not None else dense_bytes
            total = sum(other.host_needed - replicated for other in ranks)
            enough = _enough(total, own.host_available - replicated)
            cure = SMALLER_DENSE if enough is None else f"start ranks on at least {enough} hosts with as much memory"
            share = f" ({exact_bytes(own.host_available)} available to the {len(neighbours)} rank(s) of host {own.host})"
            hosts = len({other.host for other in ranks})
            return _obstacle(rank, own.host_needed, own.host_available // len(neighbours), "host memory", share, cure, enough, hosts)
    return None


def _obstacle(rank: int, needed: int, available: int, kind: str, share: str, cure: str, enough: int | None, present: int) -> str:
    if enough is not None and enough <= present:
        cure = (
            "cut every table into equal parts, which would fit: --model.embedding.sharding row_wise (for a trained run, in its config.json)"
        )
    return (
        f"the model does not fit: rank {rank} needs {exact_bytes(needed)} of {kind} for its part of the tables, their optimiser and the "
        f"dense part, and has {exact_bytes(available)}{share}, before activations; {cure}"
    )


def _enough(total: int, room: int) -> int | None:
    """How many rooms hold ``total`` bytes in equal parts; None if a room has no place for any."""
    return math.ceil(total / room) if room > 0 else None
