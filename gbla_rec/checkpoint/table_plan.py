"""A plan of the tables: TorchRec's sharding plan and its estimate of every rank's memory, split by what the memory is for."""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import PlannerError, ShardingOption, Storage
from torchrec.distributed.types import ShardingPlan

from gbla_rec.checkpoint.plan_search import PlanRequest, estimate_storage, search_plan
from gbla_rec.checkpoint.plan_shortage import describe_shortage


@dataclass(frozen=True)
class TablePlan:
    """What the planner decided.

    Attributes:
        request: what was asked.
        sharding_plan: for ``DistributedModelParallel``.
        options: per table: sharding type, kernel, and each shard's rank and bytes.
    """

    request: PlanRequest
    sharding_plan: ShardingPlan
    options: list[ShardingOption]


@dataclass(frozen=True)
class MemoryPart:
    """Bytes of one rank, on the device and on its host."""

    device: int
    host: int


@dataclass(frozen=True)
class RankMemory:
    """TorchRec's storage estimate of one rank.

    Attributes:
        rows: rows of the tables; their cache on the device where the placement is ``uvm_caching``.
        optimizer: row-wise Adagrad's moments, and the state of caches.
        exchange: ids and rows of one step.
    """

    rows: MemoryPart
    optimizer: MemoryPart
    exchange: MemoryPart

    @property
    def device(self) -> int:
        """Bytes of device memory."""
        return self.rows.device + self.optimizer.device + self.exchange.device

    @property
    def host(self) -> int:
        """Bytes of host memory."""
        return self.rows.host + self.optimizer.host + self.exchange.host


def plan_tables(request: PlanRequest) -> TablePlan:
    """Plan the tables of a request; needs no process group and no memory for the tables.

    Raises:
        ValueError: if no plan fits; the message says by how many bytes, and what to change.
    """
    try:
        sharding_plan, options = search_plan(request)
    except PlannerError as error:
        raise ValueError(describe_shortage(request)) from error
    return TablePlan(request, sharding_plan, options)


def rank_memories(plan: TablePlan) -> list[RankMemory]:
    """The estimate of each rank; the parts of a rank add up to the planner's own number."""
    tokens = plan.request.lookups_per_rank
    rows = _by_rank(plan, estimate_storage(plan.request, is_inference=True))
    whole = _by_rank(plan, estimate_storage(plan.request))
    # the exchange is proportional to the tokens: what as many again would add
    doubled = _by_rank(plan, estimate_storage(plan.request, tokens_per_rank=2 * tokens))
    memories = []
    for own_rows, own, own_doubled in zip(rows, whole, doubled, strict=True):
        exchange = MemoryPart(own_doubled.hbm - own.hbm, own_doubled.ddr - own.ddr)
        optimizer = MemoryPart(own.hbm - own_rows.hbm - exchange.device, own.ddr - own_rows.ddr - exchange.host)
        memories.append(RankMemory(MemoryPart(own_rows.hbm, own_rows.ddr), optimizer, exchange))
    return memories


def _by_rank(plan: TablePlan, storages: dict[tuple[str, str, str], list[Storage]]) -> list[Storage]:
    ranks = [Storage(hbm=0, ddr=0, ssd=0) for _ in range(plan.request.cluster.world_size)]
    for option in plan.options:
        shards: Sequence[Storage] = storages[option.name, option.sharding_type, option.compute_kernel]
        for shard, storage in zip(option.shards, shards, strict=True):
            assert shard.rank is not None
            ranks[shard.rank] += storage
    return ranks
