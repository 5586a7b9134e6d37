"""TorchRec's planner, with our limits: which sharding types and kernels a table may get, and how long the search may take."""

from dataclasses import dataclass

from torch import nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import EmbeddingShardingPlanner
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints, ShardingOption, Stats, Storage
from torchrec.distributed.types import CacheParams, ModuleSharder, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection

from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.table_communication import codecs
from gbla_rec.config import EmbeddingConfig

# not data_parallel: TorchRec pools it wrongly on CPU, and multi-hash tables are too large for it
SHARDING_TYPES = {
    # no column_wise: row-wise Adagrad would keep one moment per column shard, and curves would depend on the ranks
    "auto": [ShardingType.TABLE_WISE.value, ShardingType.ROW_WISE.value],
    "row_wise": [ShardingType.ROW_WISE.value],
    "table_wise": [ShardingType.TABLE_WISE.value],
    "column_wise": [ShardingType.COLUMN_WISE.value],
}
KERNELS = {
    "hbm": [EmbeddingComputeKernel.FUSED.value],
    "uvm_caching": [EmbeddingComputeKernel.FUSED_UVM_CACHING.value],
    "uvm": [EmbeddingComputeKernel.FUSED_UVM.value],
}
KERNELS["auto"] = [kernel for kernels in KERNELS.values() for kernel in kernels]
GRID_SEARCH_SHARDS = 50_000
"""Shards that the exhaustive search may place: at 1,024 ranks it would take minutes, and the greedy proposers find the same."""


@dataclass(frozen=True)
class PlanRequest:
    """What to plan: tables, how they may be sharded, on which ranks.

    Attributes:
        model: holds one ``EmbeddingCollection`` on meta; its path in the plan is its path in ``model``.
        embedding: allowed sharding types, kernels, reserve.
        cluster: the ranks.
        lookups_per_batch: items that the ranks look up among them for a global batch, one row of each table.
        candidates_per_rank: items that every rank looks up besides, for an item-level head.
    """

    model: nn.Module
    embedding: EmbeddingConfig
    cluster: Cluster
    lookups_per_batch: int
    candidates_per_rank: int = 0

    @property
    def lookups_per_rank(self) -> int:
        """Items that a rank looks up in a batch, on average."""
        return self.cluster.tokens_per_rank(self.lookups_per_batch) + self.candidates_per_rank

    @property
    def kernels(self) -> list[str]:
        """The kernels that the planner may choose; there is no choice on CPU."""
        return KERNELS["hbm" if self.cluster.device_type == "cpu" else self.embedding.placement]

    @property
    def sharding_types(self) -> list[str]:
        """The sharding types that the planner may choose."""
        return SHARDING_TYPES[self.embedding.sharding]


class BestPlan(Stats):
    """Keeps what the planner found in place of printing it."""

    options: list[ShardingOption]

    def log(self, *, best_plan: list[ShardingOption], **_: object) -> None:  # type: ignore[override]
        """Called by the planner when it is done."""
        self.options = best_plan


def table_sharder(embedding: EmbeddingConfig, device_type: str) -> EmbeddingCollectionSharder:
    """The sharder of our tables; index de-duplication needs CUDA."""
    return EmbeddingCollectionSharder(use_index_dedup=device_type == "cuda", qcomm_codecs_registry=codecs(embedding.communication))


def search_plan(request: PlanRequest) -> tuple[ShardingPlan, list[ShardingOption]]:
    """The fastest plan that fits, by TorchRec's estimates, and the planner's numbers for each table: ranks and bytes of its shards.

    Raises:
        PlannerError: if none fits.
        ValueError: if the placement needs CUDA and the ranks have none.
    """
    embedding, cluster = request.embedding, request.cluster
    if cluster.device_type == "cpu" and embedding.placement in ("uvm_caching", "uvm"):
        raise ValueError(
            f"EmbeddingConfig.placement must be 'auto' or 'hbm' on CPU, where all memory is host memory, got {embedding.placement!r}; "
            "run on a GPU, or give --model.embedding.placement auto (for a trained run: write it into the run's config.json)"
        )
    found = BestPlan()
    planner = EmbeddingShardingPlanner(
        topology=cluster.topology(embedding.memory_reserve),
        constraints=constraints(request),
        storage_reservation=FixedPercentageStorageReservation(embedding.memory_reserve),
        proposer=[
            GridSearchProposer(max_proposals=max(1, GRID_SEARCH_SHARDS // cluster.world_size)),
            GreedyProposer(),
            GreedyProposer(use_depth=False),
            UniformProposer(),
        ],
        stats=found,
        debug=False,
    )
    plan = planner.plan(request.model, _sharders(request))
    return plan, found.options


def constraints(request: PlanRequest, tokens_per_rank: int | None = None) -> dict[str, ParameterConstraints]:
    """What the planner must know of each table, by name.

    Args:
        request: see ``PlanRequest``.
        tokens_per_rank: None takes the request's.
    """
    tokens = tokens_per_rank if tokens_per_rank is not None else request.lookups_per_rank
    is_cached = EmbeddingComputeKernel.FUSED_UVM_CACHING.value in request.kernels
    one_table = ParameterConstraints(
        sharding_types=request.sharding_types,
        compute_kernels=request.kernels,
        # one id a token: only the product of batch size and pooling factor counts
        batch_sizes=[tokens],
        pooling_factors=[1.0],
        cache_params=CacheParams(load_factor=request.embedding.cache_load_factor) if is_cached else None,
    )
    tables = [
        table for module in request.model.modules() if isinstance(module, EmbeddingCollection) for table in module.embedding_configs()
    ]
    return {table.name: one_table for table in tables}


def estimate_storage(
    request: PlanRequest, *, tokens_per_rank: int | None = None, is_inference: bool = False
) -> dict[tuple[str, str, str], list[Storage]]:
    """TorchRec's estimate of the bytes of each shard, by table, sharding type and kernel.

    Args:
        request: see ``PlanRequest``.
        tokens_per_rank: None takes the request's.
        is_inference: rows alone, without optimiser state and exchange.
    """
    cluster = request.cluster
    topology, limits = cluster.topology(request.embedding.memory_reserve), constraints(request, tokens_per_rank)
    estimator = EmbeddingStorageEstimator(topology=topology, constraints=limits, is_inference=is_inference)
    enumerator = EmbeddingEnumerator(topology=topology, batch_size=1, constraints=limits, estimator=estimator)
    options = enumerator.enumerate(request.model, _sharders(request))
    return {
        (option.name, option.sharding_type, option.compute_kernel): [_storage(shard.storage) for shard in option.shards]
        for option in options
    }


def _sharders(request: PlanRequest) -> list[ModuleSharder[nn.Module]]:
    return [table_sharder(request.embedding, request.cluster.device_type)]  # type: ignore[list-item]


def _storage(storage: Storage | None) -> Storage:
    assert storage is not None
    return storage
