"""Whoever gets a table in host memory without asking is told, with cures that work; all others hear nothing of it."""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.cluster_plan import Catalogue, ClusterPlan, plan_cluster
from gbla_rec.checkpoint.cluster_plan_text import describe_cluster_plan
from gbla_rec.checkpoint.host_placement import host_placement
from gbla_rec.checkpoint.plan_search import PlanRequest
from gbla_rec.checkpoint.sharding import planned_tables
from gbla_rec.config import EmbeddingConfig, ModelConfig, OptimizerConfig, RunConfig

ONE_GPU = Cluster(device_type="cuda", world_size=1, ranks_per_node=1, device_memory=79 << 30, host_memory=2 * 10**12)
EIGHT_GPUS = dataclasses.replace(ONE_GPU, world_size=8, ranks_per_node=8)
CPUS = Cluster(device_type="cpu", world_size=1, ranks_per_node=1, device_memory=0, host_memory=2 * 10**12)
# 51.6 GB of rows and moments, where a reserve of 40 % leaves 50.9 GB
LARGE = EmbeddingConfig(rows_per_table=50_000_000, dim=128)


def planned(embedding: EmbeddingConfig, cluster: Cluster) -> ClusterPlan:
    config = RunConfig(name="large", dataset="large", model=ModelConfig(embedding=embedding))
    return plan_cluster(config, cluster, Catalogue(num_items=10**6, context_sizes={}, code_widths=(1_024, 1_024, 256)))


def text_of(plan: ClusterPlan) -> str:
    return describe_cluster_plan(plan, write_rate=10**9)


def is_in_device_memory(plan: ClusterPlan) -> bool:
    return {table.kernel for table in plan.tables} == {"fused"}


@pytest.mark.parametrize(("embedding", "cluster"), [(LARGE, ONE_GPU), (dataclasses.replace(LARGE, rows_per_table=400_000_000), EIGHT_GPUS)])
def test_a_table_in_host_memory_is_named_and_every_cure_brings_it_back(embedding: EmbeddingConfig, cluster: Cluster) -> None:
    plan = planned(embedding, cluster)
    in_host = {table.name: table.kernel for table in plan.tables if table.kernel != "fused"}
    assert in_host and plan.host_placement is not None and plan.host_placement.kernels == in_host
    text = text_of(plan)
    named = ", ".join(f"{table} ({kernel})" for table, kernel in in_host.items())
    assert f"placement 'auto' put into host memory: {named}. Rows that are not cached" in text and "the host's bus" in text

    def cured(pattern: str, name: str, kind: Any) -> None:
        found = re.search(pattern, text)
        assert found, text
        value = {name: kind(found[1])}
        if name == "world_size":
            assert is_in_device_memory(planned(embedding, dataclasses.replace(cluster, **value)))
        else:
            better = planned(dataclasses.replace(embedding, **value), cluster)
            assert is_in_device_memory(better) and better.host_placement is None

    cured(r"--model.embedding.memory-reserve ([0-9.]+) or less", "memory_reserve", float)
    cured(r"more ranks: (\d+) are enough", "world_size", int)
    cured(r"--model.embedding.rows-per-table (\d+) or less", "rows_per_table", int)
    cured(r"--model.embedding.dim (\d+) or less", "dim", int)
    assert "uvm" not in text.split("To hold all tables in device memory")[1], "host memory is no cure"


def test_the_reserve_that_would_do_is_the_one_that_the_refusal_of_device_memory_names() -> None:
    with pytest.raises(ValueError, match="do not fit") as refused:
        planned(dataclasses.replace(LARGE, placement="hbm"), ONE_GPU)
    (reserve,) = re.findall(r"--model.embedding.memory-reserve [0-9.]+ or less", str(refused.value))
    placement = planned(LARGE, ONE_GPU).host_placement
    assert placement is not None and next(cure for cure in placement.cures if "reserve" in cure).endswith(reserve)


def test_a_reserve_that_cannot_help_is_not_offered() -> None:
    placement = planned(dataclasses.replace(LARGE, rows_per_table=150_000_000), ONE_GPU).host_placement
    assert placement is not None and placement.cures and not any("reserve" in cure for cure in placement.cures)


@pytest.mark.parametrize(
    ("embedding", "cluster"),
    [
        (dataclasses.replace(LARGE, rows_per_table=10_000_000), ONE_GPU),
        (dataclasses.replace(LARGE, memory_reserve=0.39), ONE_GPU),
        (dataclasses.replace(LARGE, placement="uvm_caching"), ONE_GPU),
        (dataclasses.replace(LARGE, placement="uvm"), ONE_GPU),
        (LARGE, CPUS),
    ],
    ids=["small", "lower_reserve", "asked_for_a_cache", "asked_for_host_memory", "cpu"],
)
def test_nothing_is_said_where_device_memory_holds_all_or_host_memory_was_asked_for(embedding: EmbeddingConfig, cluster: Cluster) -> None:
    plan = planned(embedding, cluster)
    assert plan.host_placement is None and "put into host memory" not in text_of(plan)


def test_tables_that_fit_after_all_are_told_the_sharding_that_fits() -> None:
    small = dataclasses.replace(LARGE, rows_per_table=1_000)
    tables = nn.ModuleDict({"tables": planned_tables(small, OptimizerConfig(), {})})
    found = host_placement(PlanRequest(tables, small, ONE_GPU, 4_096), {"item_hash_0": "fused_uvm", "item_hash_1": "fused"})
    assert found is not None and list(found.kernels) == ["item_hash_0"]
    (cure,) = found.cures
    assert re.fullmatch(r"a plan that fits: --model.embedding.placement hbm --model.embedding.sharding (row|table)_wise", cure)


def train_on(rank: int, config: RunConfig, cluster: Cluster | None) -> None:
    """Train on the CPU; with a ``cluster``, as if its planner had put ``item_hash_1`` into host memory."""
    from gbla_rec.checkpoint import run_parts
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training.trainer import train

    if cluster is not None:
        run_parts.table_kernels = lambda model: {"item_hash_0": "fused", "item_hash_1": "fused_uvm_caching"}
        # the tables that are trained lie where the real ranks have them
        run_parts.Cluster = SimpleNamespace(current=lambda device: cluster)
    with process_group() as device:
        train(config, device=device)


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(120)
def test_training_says_it_once_on_the_first_rank_and_nothing_on_cpu(launch_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(training=dataclasses.replace(tiny_run().training, num_steps=1))
    small = dataclasses.replace(EIGHT_GPUS, world_size=2, ranks_per_node=2, device_memory=10_000)
    outputs = []
    for world_size, cluster in ((2, small), (1, None)):
        for status, output in launch_ranks(train_on, world_size, config, cluster):
            assert status == 0, output
            outputs.append(output)
    said = "placement 'auto' put into host memory: item_hash_1 (fused_uvm_caching). Rows"
    assert [output.count(said) for output in outputs] == [1, 0, 0]
    assert "in device memory, change one of these:\n  - " in outputs[0]
