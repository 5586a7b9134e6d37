"""The retriever on many ranks: tables sharded by TorchRec's planner, the dense part replicated."""

import os
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import ParameterConstraints
from torchrec.distributed.types import ModuleSharder, ShardingEnv, ShardingPlan, ShardingType
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from gbla_kernels import Backend
from gbla_rec.checkpoint.memory import require_memory
from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.config import ModelConfig, OptimizerConfig, Sharding
from gbla_rec.data.batch import feature_names
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.retriever import GenerativeRetriever

HBM_RESERVED = 0.4
"""Fraction of device memory that the planner leaves to the dense part, activations and communication."""
# not data_parallel: TorchRec pools it wrongly on CPU, and multi-hash tables are too large for it
SHARDING_TYPES = {
    # no column_wise: row-wise Adagrad would keep one moment per column shard, and curves would depend on the ranks
    "auto": [ShardingType.TABLE_WISE, ShardingType.ROW_WISE],
    "row_wise": [ShardingType.ROW_WISE],
    "table_wise": [ShardingType.TABLE_WISE],
    "column_wise": [ShardingType.COLUMN_WISE],
}


def sharded_retriever(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    context_sizes: Mapping[str, int],
    item_codes: Tensor,
    widths: tuple[int, ...],
    *,
    seed: int,
    device: torch.device,
) -> DistributedModelParallel:
    """Build, plan, shard and initialise the retriever on the current process group.

    The initial weights depend on the seed alone, not on the number of ranks or the sharding. The tables step inside
    backward with fused row-wise Adagrad.

    Args:
        model: tables, encoder, decoder.
        optimizer: settings of the fused table optimiser.
        context_sizes: values of each context column of the dataset.
        item_codes: ``(N, C)`` int64 semantic IDs.
        widths: codes of each level, ``C`` entries.
        seed: of all weights.
        device: of this rank.

    Raises:
        ValueError: on all ranks if the plan does not fit into the memory of one; states the bytes.
    """
    tables = item_tables(model.embedding, context_sizes, torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": optimizer.table_learning_rate, "eps": optimizer.table_eps})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        retriever = GenerativeRetriever(tables, model, feature_names(model.embedding), item_codes, widths, backend=Backend(model.kernels))
    retriever.history.to(device)
    sharders: list[ModuleSharder[nn.Module]] = [EmbeddingCollectionSharder(use_index_dedup=device.type == "cuda")]  # type: ignore[list-item]
    plan = plan_tables(retriever, model.embedding.sharding, sharders, device)
    require_memory(plan, retriever.history, device)
    process_group = dist.group.WORLD
    assert process_group is not None
    parallel = DistributedModelParallel(
        retriever,
        env=ShardingEnv.from_process_group(process_group),
        device=device,
        plan=plan,
        sharders=sharders,
        # DDP's static graph cannot leave the all-reduce out of its first backward (gradient accumulation)
        data_parallel_wrapper=DefaultDataParallelWrapper(static_graph=False),
    )
    initialize_tables(unwrap(parallel).tables, seed)
    return parallel


def plan_tables(model: nn.Module, sharding: Sharding, sharders: list[ModuleSharder[nn.Module]], device: torch.device) -> ShardingPlan:
    """TorchRec's plan for the tables of ``model`` on the current process group, made on rank 0."""
    allowed = ParameterConstraints(sharding_types=[kind.value for kind in SHARDING_TYPES[sharding]])
    tables = [table for module in model.modules() if isinstance(module, EmbeddingCollection) for table in module.embedding_configs()]
    constraints = {table.name: allowed for table in tables}
    is_cuda = device.type == "cuda"
    topology = Topology(
        world_size=dist.get_world_size(),
        compute_device=device.type,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())),
        hbm_cap=torch.cuda.get_device_properties(device).total_memory if is_cuda else None,
    )
    planner = EmbeddingShardingPlanner(
        topology=topology, constraints=constraints, storage_reservation=FixedPercentageStorageReservation(HBM_RESERVED), debug=False
    )
    return on_first_rank(lambda: planner.plan(model, sharders))


def unwrap(parallel: DistributedModelParallel) -> GenerativeRetriever:
    """The retriever inside its data-parallel wrappers; its methods other than forward are called on it."""
    module = parallel.module
    while not isinstance(module, GenerativeRetriever):
        assert isinstance(module.module, nn.Module)
        module = module.module
    return module


def describe_plan(parallel: DistributedModelParallel) -> str:
    """The sharding plan as text: table, sharding type, kernel, ranks, rows x width of each shard."""
    lines = []
    for module_plan in parallel.plan.plan.values():
        for table, sharding in module_plan.items():  # type: ignore[attr-defined]
            pieces = [(*shard.shard_sizes, shard.placement) for shard in sharding.sharding_spec.shards]
            shards = ", ".join(f"{rows:,} x {columns} on {placement}" for rows, columns, placement in pieces)
            lines.append(f"{table}: {sharding.sharding_type}, {sharding.compute_kernel}: {shards}")
    return "\n".join(lines)
