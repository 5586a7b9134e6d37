"""Plans of tables: the estimate is the memory of real shards, and a plan that does not fit says what would."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.cluster_plan import Catalogue, plan_cluster
from gbla_rec.checkpoint.plan_search import PlanRequest
from gbla_rec.checkpoint.plan_shortage import rank_storages
from gbla_rec.checkpoint.sharding import planned_tables
from gbla_rec.checkpoint.table_plan import plan_tables, rank_memories
from gbla_rec.config import EmbeddingConfig, ModelConfig, OptimizerConfig, RunConfig, SemanticIdConfig, StreamConfig

SHARDED = ("row_wise", "table_wise", "column_wise")
CPU = torch.device("cpu")
CONTEXT_SIZES = {"kind": 2}
GPUS = Cluster(device_type="cuda", world_size=16, ranks_per_node=8, device_memory=80 * 10**9, host_memory=2 * 10**12)
CPUS = Cluster(device_type="cpu", world_size=2, ranks_per_node=2, device_memory=0, host_memory=16 * 10**9)


def request(embedding: EmbeddingConfig, cluster: Cluster, tokens_per_batch: int = 65_536) -> PlanRequest:
    tables = planned_tables(embedding, OptimizerConfig(), CONTEXT_SIZES)
    return PlanRequest(nn.ModuleDict({"tables": tables}), embedding, cluster, tokens_per_batch)


def with_embedding(config: RunConfig, **changes: Any) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


def bytes_of_local_shards(rank: int, world_size: int, config: RunConfig) -> tuple[int, int, str]:
    """Bytes of this rank's rows and moments in a real sharded model, and its plan."""
    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.checkpoint.sharding import describe_plan

    model = RunParts.open(config, CPU).model
    rows = [value for name, value in model.state_dict().items() if ".tables." in f".{name}"]
    moments = [value for state in model.fused_optimizer.state_dict()["state"].values() for value in state.values()]

    def local_bytes(tensors: list[Any]) -> int:
        return sum(shard.tensor.nbytes for tensor in tensors for shard in tensor.local_shards())

    return local_bytes(rows), local_bytes(moments), describe_plan(model)


@pytest.mark.usefixtures("tiny_workspace")
def test_the_estimate_is_the_memory_of_the_real_shards(run_ranks: Any, tiny_run: Any) -> None:
    # an odd number of rows: the last rank gets fewer; two column shards need 256 columns
    configs = [with_embedding(tiny_run(), sharding=kind, rows_per_table=1_001, num_hashes=3, dim=256) for kind in SHARDED]

    def measure(rank: int, world_size: int) -> list[tuple[int, int, str]]:
        return [bytes_of_local_shards(rank, world_size, config) for config in configs]

    for config, *real in zip(configs, *run_ranks(measure, 2), strict=True):
        plan = plan_tables(request(config.model.embedding, CPUS, config.stream.tokens_per_batch))
        memories = rank_memories(plan)
        assert sum(rows for rows, _, _ in real) == (3 * 1_001 + 2) * 256 * 4
        assert [memory.rows.host for memory in memories] == [rows for rows, _, _ in real]
        # TorchRec splits one moment over the column shards, fbgemm keeps one for each
        column_shards = 2 if config.model.embedding.sharding == "column_wise" else 1
        assert [memory.optimizer.host * column_shards for memory in memories] == [moments for _, moments, _ in real]
        for option in plan.options:
            rows, columns = option.shards[0].size
            assert f"{option.name}: {option.sharding_type}, fused: {rows:,} x {columns}" in real[0][2]


@pytest.mark.parametrize("placement", ["auto", "hbm", "uvm_caching", "uvm"])
@pytest.mark.parametrize("sharding", ["auto", "row_wise", "table_wise", "column_wise"])
def test_parts_of_a_rank_add_up_to_the_planners_number(placement: Any, sharding: Any) -> None:
    embedding = EmbeddingConfig(rows_per_table=1_000_003, dim=128, sharding=sharding, placement=placement, context_features=("kind",))
    plan = plan_tables(request(embedding, GPUS))
    kernels = {"hbm": "fused", "auto": "fused", "uvm_caching": "fused_uvm_caching", "uvm": "fused_uvm"}
    assert {option.compute_kernel for option in plan.options} == {kernels[placement]}
    assert sharding == "auto" or {option.sharding_type for option in plan.options} == {sharding}
    for memory, storage in zip(rank_memories(plan), rank_storages(plan.options, 16), strict=True):
        assert (memory.device, memory.host) == (storage.hbm, storage.ddr)
        assert min(memory.rows.device, memory.optimizer.device, memory.exchange.device, memory.rows.host, memory.optimizer.host) >= 0


def test_a_cache_takes_its_part_of_the_rows() -> None:
    for load_factor in (0.1, 0.5):
        embedding = EmbeddingConfig(rows_per_table=16_000_000, dim=128, placement="uvm_caching", cache_load_factor=load_factor)
        memory = rank_memories(plan_tables(request(embedding, GPUS)))[0]
        assert memory.rows.host == 2 * 1_000_000 * 128 * 4
        assert memory.rows.device == pytest.approx(load_factor * memory.rows.host)


def test_auto_goes_to_host_memory_where_device_memory_is_short() -> None:
    plan = plan_tables(request(EmbeddingConfig(rows_per_table=10**9, dim=128), GPUS))
    # 64 GB a rank do not fit 48 GB; both tables need not move
    assert "fused" != {option.compute_kernel for option in plan.options}
    assert all(storage.hbm <= 48 * 10**9 for storage in rank_storages(plan.options, 16))


def test_a_shortage_is_told_in_bytes_and_every_cure_works() -> None:
    embedding = EmbeddingConfig(rows_per_table=10**9, dim=128, placement="hbm", sharding="row_wise", memory_reserve=0.4)
    with pytest.raises(ValueError, match="do not fit on 16 cuda rank") as refused:
        plan_tables(request(embedding, GPUS))
    message = str(refused.value)
    # 2 tables of 10^9 rows of 128 floats and a moment over 16 ranks; ids, and rows of 4,096 tokens, for each table
    needed = 2 * (10**9 // 16 * (128 + 1) * 4 + 4_096 * (8 + 128 * 4))
    short = int(re.search(r"short by .*? \(([0-9,]+) bytes\)", message)[1].replace(",", ""))  # type: ignore[index]
    assert short == needed - 48 * 10**9

    def cured(pattern: str, **changes: Any) -> None:
        found = re.search(pattern, message)
        assert found, message
        value = {name: kind(found[1]) for name, kind in changes.items()}
        if "world_size" in value:
            plan_tables(request(embedding, dataclasses.replace(GPUS, **value)))
        else:
            plan_tables(request(dataclasses.replace(embedding, **value), GPUS))

    cured(r"more ranks: (\d+) are enough", world_size=int)
    cured(r"--model.embedding.rows-per-table (\d+)", rows_per_table=int)
    cured(r"--model.embedding.dim (\d+)", dim=int)
    cured(r"--model.embedding.placement (uvm_caching) fits", placement=str)
    cured(r"--model.embedding.memory-reserve ([0-9.]+)", memory_reserve=float)


def test_a_table_larger_than_a_device_is_told_to_be_cut_by_rows() -> None:
    embedding = EmbeddingConfig(num_hashes=1, rows_per_table=10**8, dim=128, placement="hbm", sharding="table_wise")
    with pytest.raises(ValueError, match=r"--model.embedding.sharding row_wise"):
        plan_tables(request(embedding, GPUS))
    plan_tables(request(dataclasses.replace(embedding, sharding="row_wise"), GPUS))


def test_host_placement_is_refused_on_cpu() -> None:
    for placement in ("uvm_caching", "uvm"):
        with pytest.raises(ValueError, match=r"EmbeddingConfig.placement must be 'auto' or 'hbm' on CPU.*run on a GPU"):
            plan_tables(request(EmbeddingConfig(placement=placement), CPUS))


@pytest.mark.usefixtures("tiny_workspace")
def test_all_ranks_hear_of_tables_that_do_not_fit(run_ranks: Any, tiny_run: Any) -> None:
    config = with_embedding(tiny_run(), rows_per_table=10**10)

    def attempt(rank: int, world_size: int) -> str:
        from gbla_rec.training.trainer import train

        with pytest.raises(ValueError, match=r"do not fit on 2 cpu rank\(s\)[\s\S]*change one of these .*:\n  - more ranks") as refused:
            train(config, device=CPU)
        return str(refused.value)

    first, second = run_ranks(attempt, 2)
    assert first == second


@pytest.mark.timeout(60)
def test_ten_billion_rows_are_planned_in_seconds() -> None:
    embedding = EmbeddingConfig(rows_per_table=10**10, dim=128)
    config = RunConfig(name="large", dataset="large", model=ModelConfig(embedding=embedding), stream=StreamConfig(tokens_per_batch=1 << 24))
    cluster = dataclasses.replace(GPUS, world_size=256)
    plan = plan_cluster(config, cluster, Catalogue(num_items=10**6, context_sizes={}, code_widths=(1_024, 1_024, 256)))
    assert plan.planning_seconds < 20
    assert plan.checkpoint.table_rows == 2 * 10**10 * 128 * 4
    assert plan.fullest_rank.rows.device + plan.fullest_rank.rows.host >= plan.checkpoint.table_rows // 256
    assert plan.exchange.rows == 2 * (1 << 24) * 128 * 4 and plan.exchange.ids == 2 * (1 << 24) * 8


@pytest.mark.parametrize("sharding", SHARDED)
def test_the_table_that_code_tokens_leave_is_planned_and_exchanges_nothing(sharding: Any) -> None:
    embedding = EmbeddingConfig(dim=256, tokens="codes", sharding=sharding)
    for cluster in (CPUS, GPUS):
        run = RunConfig(name="codes", dataset="codes", model=ModelConfig(embedding=embedding))
        plan = plan_cluster(run, cluster, Catalogue(num_items=10**6, context_sizes={}, code_widths=(256, 256, 256, 16)))
        assert [(table.name, table.rows) for table in plan.tables] == [("item_hash_0", 1024)]
        assert plan.exchange.rows == plan.exchange.ids == plan.exchange.busiest_rank == 0
        assert plan.dense.hash_rows_host == 10**6 * 8


@pytest.mark.usefixtures("tiny_workspace")
def test_item_features_are_planned_as_wide_as_they_were_made(tiny_run: Any, tiny_workspace: Path) -> None:
    from gbla_rec.checkpoint.known_catalogue import known_catalogue

    config, reading = tiny_run(), with_embedding(tiny_run(), item_features=True)
    width = np.load(tiny_workspace / "semantic_ids" / "tiny" / "item_features.npy").shape[1]
    assert [known_catalogue(of)[0].feature_dim for of in (config, reading)] == [0, width]
    without, with_features = (plan_cluster(of, CPUS, known_catalogue(of)[0]).dense for of in (config, reading))
    assert with_features.item_codes - without.item_codes == 80 * width * 4
    # of the input's projection
    assert with_features.weights - without.weights == width * config.model.encoder.model_dim * 4
    both = dataclasses.replace(reading, dataset="not_made", semantic_ids=SemanticIdConfig(embedding="text_and_behaviour", embedding_dim=20))
    assert known_catalogue(both)[0].feature_dim == 40


@pytest.mark.usefixtures("tiny_workspace")
def test_a_dense_part_larger_than_the_reserve_is_refused() -> None:
    config = RunConfig(name="large", dataset="large")
    with pytest.raises(ValueError, match=r"every rank holds does not fit: .* short by .*\(\d[0-9,]+ bytes\); give a higher"):
        plan_cluster(config, GPUS, Catalogue(num_items=10**10, context_sizes={}, code_widths=(2_048, 2_048, 2_048, 256)))


def train_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU))


@pytest.mark.usefixtures("tiny_workspace")
def test_a_planned_checkpoint_is_as_large_as_a_real_one(run_ranks: Any, tiny_run: Any) -> None:
    from gbla_rec.checkpoint.known_catalogue import known_catalogue
    from gbla_rec.checkpoint.run_directory import checkpoints, file_sizes

    config = with_embedding(tiny_run(), sharding="row_wise", rows_per_table=200_001)
    run_dir = run_ranks(train_run, 2, config)[0]
    catalogue, source = known_catalogue(config)
    assert "tiny" in source and catalogue.num_items == 80
    size = plan_cluster(config, CPUS, catalogue).checkpoint
    sizes = file_sizes(checkpoints(Path(run_dir))[-1].path)
    assert size.data_files == sum(name.endswith(".distcp") for name in sizes)
    assert size.metadata == pytest.approx(sizes[".metadata"], rel=0.1)
    data = [length for name, length in sizes.items() if name.endswith(".distcp")]
    # torch.save puts some 2 KB around each of the 180 tensors
    assert 0 <= sum(data) - (size.total - size.metadata) < 180 * 2_500
    assert abs(max(data) - size.largest_rank) < 180 * 2_500


@pytest.mark.parametrize("world_size", [1, 4])
def test_candidates_of_every_rank_take_the_memory_of_as_many_tokens_a_rank(world_size: int) -> None:
    cluster = dataclasses.replace(CPUS, world_size=world_size)
    embedding = EmbeddingConfig(rows_per_table=10_000, dim=64)
    with_candidates = dataclasses.replace(request(embedding, cluster, 8_000), candidates_per_rank=500)
    as_tokens = request(embedding, cluster, 8_000 + world_size * 500)
    without = request(embedding, cluster, 8_000)
    found, expected, less = (rank_memories(plan_tables(made))[0].exchange for made in (with_candidates, as_tokens, without))
    assert found == expected and found.host > less.host
