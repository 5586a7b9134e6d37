"""The ranks that tables are planned for, and their memory: those that run, or those of a cluster that is only planned."""

import os
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torchrec.distributed.planner import Topology

from gbla_rec.checkpoint.host_memory import total_host_bytes
from gbla_rec.config.rules import require, require_choice, require_positive

DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Cluster:
    """Equal ranks on equal nodes."""

    device_type: DeviceType
    world_size: int
    ranks_per_node: int
    device_memory: int
    """Bytes of one CUDA device; 0 on CPU."""
    host_memory: int
    """Bytes of one node, shared by its ranks."""

    def __post_init__(self) -> None:
        require_choice(self, "device_type", DeviceType)
        require_positive(self, "world_size", "ranks_per_node", "host_memory")
        is_cpu = self.device_type == "cpu"
        require((self.device_memory == 0) == is_cpu, "Cluster.device_memory", "be positive on CUDA and 0 on CPU", self.device_memory)

    @classmethod
    def current(cls, device: torch.device) -> "Cluster":
        """The ranks of the current process group; every rank and node is taken to be like this one."""
        is_cuda = device.type == "cuda"
        return cls(
            device_type="cuda" if is_cuda else "cpu",
            world_size=dist.get_world_size(),
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
            device_memory=torch.cuda.get_device_properties(device).total_memory if is_cuda else 0,
            host_memory=total_host_bytes(),
        )

    @property
    def num_nodes(self) -> int:
        """Nodes; the last one may have fewer ranks."""
        return -(-self.world_size // self.ranks_per_node)

    @property
    def host_memory_per_rank(self) -> int:
        """Bytes."""
        return self.host_memory // self.ranks_per_node

    def tokens_per_rank(self, tokens_per_batch: int) -> int:
        """Mean tokens of one rank, rounded up, where ``tokens_per_batch`` are the tokens of a global batch."""
        return -(-tokens_per_batch // self.world_size)

    def topology(self, reserve: float) -> Topology:
        """TorchRec's form of the cluster.

        Args:
            reserve: fraction of host memory that is taken off here; the planner takes it off device memory itself.
        """
        return Topology(
            world_size=self.world_size,
            compute_device=self.device_type,
            local_world_size=min(self.ranks_per_node, self.world_size),
            hbm_cap=self.device_memory,
            ddr_cap=int((1 - reserve) * self.host_memory_per_rank),
        )
