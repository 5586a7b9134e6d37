"""Tables that a plan on CUDA has put into host memory of its own accord, and what would keep them in device memory."""

from collections.abc import Mapping
from dataclasses import dataclass

from torchrec.distributed.embedding_types import EmbeddingComputeKernel

from gbla_rec.checkpoint.plan_search import PlanRequest
from gbla_rec.checkpoint.plan_shortage import device_memory_cures


@dataclass(frozen=True, kw_only=True)
class HostPlacement:
    """Tables in host memory where the planner chose the placement.

    Attributes:
        kernels: TorchRec's compute kernel of each table whose rows lie in host memory.
        memory_reserve: fraction of device memory that the planner kept from the tables.
        cures: each on its own lets device memory hold all tables.
    """

    kernels: Mapping[str, str]
    memory_reserve: float
    cures: tuple[str, ...]


def host_placement(request: PlanRequest, kernels: Mapping[str, str]) -> HostPlacement | None:
    """The tables that placement ``auto`` put into host memory; None if there are none, as on CPU, where no kernel has a choice.

    Args:
        request: what was planned.
        kernels: the compute kernel that the plan gives each table.
    """
    if request.embedding.placement != "auto":
        return None
    in_host = {table: kernel for table, kernel in sorted(kernels.items()) if kernel != EmbeddingComputeKernel.FUSED.value}
    if not in_host:
        return None
    return HostPlacement(kernels=in_host, memory_reserve=request.embedding.memory_reserve, cures=tuple(device_memory_cures(request)))


def describe_host_placement(placement: HostPlacement) -> str:
    """For a reader: which tables, what that costs, and the cures."""
    tables = ", ".join(f"{table} ({kernel})" for table, kernel in placement.kernels.items())
    lines = [
        f"placement 'auto' put into host memory: {tables}. Rows that are not cached on the device are read and written over the host's "
        f"bus, which makes steps slower. The planner kept a reserve of {placement.memory_reserve:.1%} of device memory from the tables."
    ]
    if placement.cures:
        lines.append("To hold all tables in device memory, change one of these:")
        lines += [f"  - {cure}" for cure in placement.cures]
    return "\n".join(lines)
