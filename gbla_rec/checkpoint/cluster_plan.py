"""A run on a cluster that is not there: plan of the tables, memory of the ranks, bytes on the network and on disk.

TorchRec's planner chooses the shards and estimates the tables' memory; what is our own number says so.
"""

import resource
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from gbla_kernels import Backend
from gbla_rec.checkpoint.checkpoint_size import CheckpointSize, checkpoint_size
from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.host_placement import HostPlacement, host_placement
from gbla_rec.checkpoint.plan_search import PlanRequest
from gbla_rec.checkpoint.shard_size import FLOAT_BYTES
from gbla_rec.checkpoint.sharding import planned_tables
from gbla_rec.checkpoint.table_communication import ELEMENT_BYTES, ID_BYTES
from gbla_rec.checkpoint.table_plan import RankMemory, TablePlan, plan_tables, rank_memories
from gbla_rec.config import RunConfig, exact_bytes, format_bytes
from gbla_rec.data.batch import feature_names, looked_up_features
from gbla_rec.models.retriever import HistoryModel

CODE_BYTES = 8
"""Semantic-ID codes, and rows of items, are int64."""
ItemSource = Literal["dataset", "option", "rows_per_table"]
FEWER_ITEMS: Mapping[ItemSource, str] = {
    "dataset": "fewer items",
    "option": "fewer --items",
    "rows_per_table": "fewer rows (--model.embedding.rows-per-table, which stands for the number of items; or give that by --items)",
}


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """What a plan must know of the data.

    Attributes:
        num_items: items with a semantic ID.
        context_sizes: values of each context column.
        code_widths: codes of each level of the semantic IDs.
        feature_dim: width of the item features that the model reads; 0: none.
        item_source: where ``num_items`` comes from; an error that asks for fewer names it.
    """

    num_items: int
    context_sizes: Mapping[str, int]
    code_widths: tuple[int, ...]
    feature_dim: int = 0
    item_source: ItemSource = "dataset"


@dataclass(frozen=True, kw_only=True)
class TableSummary:
    """One table: how it is cut, and where its rows lie."""

    name: str
    rows: int
    dim: int
    sharding: str
    kernel: str
    shards: int
    shards_per_rank: tuple[int, int]
    """Fewest and most."""
    largest_shard: tuple[int, int]
    """Rows and columns."""


@dataclass(frozen=True, kw_only=True)
class DenseMemory:
    """Our own number: what every rank holds besides tables and activations, bytes."""

    weights: int
    gradients: int
    """And DDP's buckets, a second copy of them."""
    optimizer: int
    item_codes: int
    """The semantic IDs of all items, and the features of items that the model reads, on the device."""
    hash_rows_host: int
    """The table rows of all items, in the memory of the data loader."""

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.gradients + self.optimizer + self.item_codes


@dataclass(frozen=True, kw_only=True)
class ExchangeVolume:
    """Our own number: bytes of one step's all-to-alls over all ranks, where ids are spread evenly and none repeats."""

    ids: int
    rows: int
    """In forward; their gradients in backward are as many bytes."""
    leaving_rank: float
    """Fraction that is not for the rank itself."""
    leaving_node: float
    busiest_rank: int
    """Bytes of rows that the rank with the most of them sends in forward, itself included."""
    dense_all_reduce: int
    """Bytes that a rank sends to sum the dense gradients, in a ring."""

    @property
    def total(self) -> int:
        """Ids, rows and gradients."""
        return self.ids + 2 * self.rows


@dataclass(frozen=True, kw_only=True)
class ClusterPlan:
    """Everything that ``gbla-rec plan`` tells."""

    cluster: Cluster
    memory_reserve: float
    tokens_per_batch: int
    tokens_per_rank: int
    tables: tuple[TableSummary, ...]
    fullest_rank: RankMemory
    emptiest_rank: RankMemory
    dense: DenseMemory
    exchange: ExchangeVolume
    checkpoint: CheckpointSize
    host_placement: HostPlacement | None
    planning_seconds: float
    """Of CPU time."""
    planning_memory: int
    """Bytes: the peak of the planning process, libraries included."""


def plan_cluster(config: RunConfig, cluster: Cluster, catalogue: Catalogue) -> ClusterPlan:
    """Plan a run on ``cluster``; nothing of it needs to be there, and no table is allocated.

    Raises:
        ValueError: if tables, or the dense part, do not fit; the message says by how many bytes, and what to change.
    """
    started = time.process_time()
    tables = planned_tables(config.model.embedding, config.optimizer, catalogue.context_sizes)
    modules = nn.ModuleDict({"tables": tables})
    candidates = config.candidates_per_rank(catalogue.num_items)
    request = PlanRequest(modules, config.model.embedding, cluster, config.lookups_per_batch, candidates)
    plan = plan_tables(request)
    memories = rank_memories(plan)
    shapes = _dense_shapes(config, catalogue)
    dense = _dense_memory(config, catalogue, shapes)
    _require_room_for_dense(config, cluster, dense, FEWER_ITEMS[catalogue.item_source])
    return ClusterPlan(
        cluster=cluster,
        memory_reserve=config.model.embedding.memory_reserve,
        tokens_per_batch=config.stream.tokens_per_batch,
        tokens_per_rank=cluster.tokens_per_rank(config.stream.tokens_per_batch),
        tables=_summaries(plan),
        fullest_rank=max(memories, key=lambda memory: (memory.device, memory.host)),
        emptiest_rank=min(memories, key=lambda memory: (memory.device, memory.host)),
        dense=dense,
        exchange=_exchange(plan, dense),
        checkpoint=checkpoint_size(plan, shapes),
        host_placement=host_placement(request, {option.name: option.compute_kernel for option in plan.options}),
        planning_seconds=time.process_time() - started,
        planning_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _dense_shapes(config: RunConfig, catalogue: Catalogue) -> dict[str, torch.Size]:
    """Shapes of the dense parameters by name, from a model without memory."""
    with torch.device("meta"):
        codes = torch.empty((catalogue.num_items, len(catalogue.code_widths)), dtype=torch.int64)
        model = config.model
        item_features = torch.empty((catalogue.num_items, catalogue.feature_dim)) if catalogue.feature_dim else None
        history = HistoryModel(model, feature_names(model.embedding), codes, catalogue.code_widths, Backend.REFERENCE, item_features)
    return {f"history.{name}": parameter.shape for name, parameter in history.named_parameters()}


def _dense_memory(config: RunConfig, catalogue: Catalogue, shapes: Mapping[str, torch.Size]) -> DenseMemory:
    weights = sum(shape.numel() for shape in shapes.values()) * FLOAT_BYTES
    return DenseMemory(
        weights=weights,
        gradients=2 * weights,
        optimizer=2 * weights,
        item_codes=catalogue.num_items * (len(catalogue.code_widths) * CODE_BYTES + catalogue.feature_dim * FLOAT_BYTES),
        hash_rows_host=catalogue.num_items * config.model.embedding.num_item_tables * CODE_BYTES,
    )


def _require_room_for_dense(config: RunConfig, cluster: Cluster, dense: DenseMemory, fewer_items: str) -> None:
    """The reserve must hold the dense part; activations come on top."""
    reserve = config.model.embedding.memory_reserve
    if cluster.device_type == "cuda":
        _require_room("device memory", dense.device, int(reserve * cluster.device_memory), reserve, dense.item_codes, fewer_items)
        _require_room("host memory", dense.hash_rows_host, int(reserve * cluster.host_memory_per_rank), reserve, 0, fewer_items)
    else:
        needed = dense.device + dense.hash_rows_host
        _require_room("host memory", needed, int(reserve * cluster.host_memory_per_rank), reserve, dense.item_codes, fewer_items)


def _require_room(name: str, needed: int, reserved: int, reserve: float, item_codes: int, fewer_items: str) -> None:
    if needed > reserved:
        codes = f", {format_bytes(item_codes)} of it semantic IDs and features of the items" if item_codes else ""
        raise ValueError(
            f"the part of the model that every rank holds does not fit: it needs {format_bytes(needed)} of {name} a rank{codes}, and the "
            f"reserve of {reserve:.0%} is {format_bytes(reserved)}: short by "
            f"{exact_bytes(needed - reserved)}; give a higher --model.embedding.memory-reserve, {fewer_items}, or ranks with more memory"
        )


def _summaries(plan: TablePlan) -> tuple[TableSummary, ...]:
    summaries = []
    for option in sorted(plan.options, key=lambda option: option.name):
        sizes = [(shard.size[0], shard.size[1]) for shard in option.shards]
        counts = Counter(shard.rank for shard in option.shards if shard.size[0])
        per_rank = [counts.get(rank, 0) for rank in range(plan.request.cluster.world_size)]
        rows, dim = option.tensor.shape
        summaries.append(
            TableSummary(
                name=option.name,
                rows=rows,
                dim=dim,
                sharding=option.sharding_type,
                kernel=option.compute_kernel,
                shards=sum(per_rank),
                shards_per_rank=(min(per_rank), max(per_rank)),
                largest_shard=max(sizes),
            )
        )
    return tuple(summaries)


def _exchange(plan: TablePlan, dense: DenseMemory) -> ExchangeVolume:
    cluster = plan.request.cluster
    lookups = plan.request.lookups_per_batch + cluster.world_size * plan.request.candidates_per_rank
    element_bytes = ELEMENT_BYTES[plan.request.embedding.communication]
    ids, sent = 0, [0.0] * cluster.world_size
    looked_up = looked_up_features(plan.request.embedding)
    for option in (option for option in plan.options if option.name in looked_up):
        rows, _ = option.tensor.shape
        for shard in option.shards:
            assert shard.rank is not None
            # the share of lookups whose row lies in this shard; every column shard of a row is asked for its part
            share = lookups * shard.size[0] / rows
            ids += round(share * ID_BYTES)
            sent[shard.rank] += share * shard.size[1] * element_bytes
    return ExchangeVolume(
        ids=ids,
        rows=round(sum(sent)),
        leaving_rank=1 - 1 / cluster.world_size,
        leaving_node=1 - 1 / cluster.num_nodes,
        busiest_rank=round(max(sent)),
        dense_all_reduce=round(2 * (1 - 1 / cluster.world_size) * dense.weights),
    )
