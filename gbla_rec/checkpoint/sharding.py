"""The retriever on many ranks: tables sharded by TorchRec's planner, the dense part replicated."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ModuleSharder, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from gbla_kernels import Backend
from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.memory import require_memory
from gbla_rec.checkpoint.plan_search import PlanRequest, table_sharder
from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.table_plan import plan_tables
from gbla_rec.config import EmbeddingConfig, ModelConfig, OptimizerConfig
from gbla_rec.data.batch import feature_names
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.retriever import GenerativeRetriever


def sharded_retriever(
    model: ModelConfig,
    optimizer: OptimizerConfig,
    context_sizes: Mapping[str, int],
    item_codes: Tensor,
    widths: tuple[int, ...],
    *,
    lookups_per_batch: int,
    seed: int,
    device: torch.device,
    item_features: Tensor | None = None,
    candidates_per_rank: int = 0,
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
        lookups_per_batch: items that the ranks look up among them for a global batch, from which the planner estimates what they exchange.
        seed: of all weights.
        device: of this rank.
        item_features: ``(N, F)`` fp32, where the model reads them.
        candidates_per_rank: items that every rank looks up besides.

    Raises:
        ValueError: on all ranks, if the tables do not fit the machines, or what is free of their memory now; states the bytes and
            what to change.
    """
    tables = planned_tables(model.embedding, optimizer, context_sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backend = Backend(model.kernels_on(device.type))
        retriever = GenerativeRetriever(
            tables, model, feature_names(model.embedding), item_codes, widths, backend=backend, item_features=item_features
        )
    retriever.history.to(device)
    request = PlanRequest(retriever, model.embedding, Cluster.current(device), lookups_per_batch, candidates_per_rank)
    plan = on_first_rank(lambda: plan_tables(request).sharding_plan)
    require_memory(plan, retriever.history, device, model.embedding.cache_load_factor)
    sharders: list[ModuleSharder[nn.Module]] = [table_sharder(model.embedding, device.type)]  # type: ignore[list-item]
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


def planned_tables(embedding: EmbeddingConfig, optimizer: OptimizerConfig, context_sizes: Mapping[str, int]) -> EmbeddingCollection:
    """The tables without memory, and with their fused optimiser, as the planner wants them."""
    tables = item_tables(embedding, context_sizes, torch.device("meta"))
    apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": optimizer.table_learning_rate, "eps": optimizer.table_eps})
    return tables


def unwrap(parallel: DistributedModelParallel) -> GenerativeRetriever:
    """The retriever inside its data-parallel wrappers; its methods other than forward are called on it."""
    module = parallel.module
    while not isinstance(module, GenerativeRetriever):
        assert isinstance(module.module, nn.Module)
        module = module.module
    return module


def table_kernels(parallel: DistributedModelParallel) -> dict[str, str]:
    """TorchRec's compute kernel of each table."""
    return {
        table: sharding.compute_kernel
        for module_plan in parallel.plan.plan.values()
        for table, sharding in module_plan.items()  # type: ignore[attr-defined]
    }


def describe_plan(parallel: DistributedModelParallel) -> str:
    """The sharding plan as text: table, sharding type, kernel, ranks, rows x width of each shard."""
    lines = []
    for module_plan in parallel.plan.plan.values():
        for table, sharding in module_plan.items():  # type: ignore[attr-defined]
            pieces = [(*shard.shard_sizes, shard.placement) for shard in sharding.sharding_spec.shards]
            shards = ", ".join(f"{rows:,} x {columns} on {placement}" for rows, columns, placement in pieces)
            lines.append(f"{table}: {sharding.sharding_type}, {sharding.compute_kernel}: {shards}")
    return "\n".join(lines)
