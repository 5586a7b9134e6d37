"""A model that does not fit is refused before it is allocated, with the bytes and the cure, on all ranks."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharding_spec import EnumerableShardingSpec
from torchrec.distributed.types import EmbeddingModuleShardingPlan, ParameterSharding, ShardingPlan

from gbla_rec.checkpoint import memory
from gbla_rec.checkpoint.host_memory import available_host_bytes, total_host_bytes
from gbla_rec.checkpoint.memory import MemoryBalance, find_obstacle
from gbla_rec.config import RunConfig

MIB = 2**20


def files(root: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = root / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:  9000 kB\nMemFree:  100 kB\nMemAvailable:    8000 kB\n"


def test_available_memory_is_what_the_kernel_says_or_a_group_allows(tmp_path: Path) -> None:
    machine = files(tmp_path, proc__meminfo=MEMINFO)
    assert (available_host_bytes(machine), total_host_bytes(machine)) == (8000 * 1024, 9000 * 1024)
    second = files(tmp_path, proc__self__cgroup="0::/job/step\n")
    files(second, **{"sys__fs__cgroup__job__memory_dot_max": "5000000\n", "sys__fs__cgroup__job__memory_dot_current": "3000000\n"})
    files(second, **{"sys__fs__cgroup__job__step__memory_dot_max": "max\n", "sys__fs__cgroup__job__step__memory_dot_current": "9\n"})
    # the parent's limit counts
    assert (available_host_bytes(second), total_host_bytes(second)) == (2_000_000, 5_000_000)
    # a file cache is given up when memory is needed
    files(second, **{"sys__fs__cgroup__job__memory_dot_stat": "active_file 7\ninactive_file 1500000\nslab_reclaimable 10\nanon 99\n"})
    assert available_host_bytes(second) == 3_500_017
    first = files(tmp_path / "v1", proc__meminfo=MEMINFO, proc__self__cgroup="4:cpu,memory:/docker/of-the-host\n0::/\n")
    (first / "sys/fs/cgroup/memory").mkdir(parents=True)
    (first / "sys/fs/cgroup/memory/memory.limit_in_bytes").write_text("4000000\n")
    (first / "sys/fs/cgroup/memory/memory.usage_in_bytes").write_text("3999000\n")
    assert available_host_bytes(first) == 1000
    with pytest.raises(OSError, match="has no MemAvailable"):
        available_host_bytes(tmp_path / "empty")
    assert 0 < available_host_bytes() < total_host_bytes() < 2**50


def on_gpu(needed: int, available: int) -> MemoryBalance:
    return MemoryBalance(host="a", device_needed=needed, device_available=available, host_needed=0, host_available=MIB)


def on_cpu(host: str, needed: int, available: int) -> MemoryBalance:
    return MemoryBalance(host=host, device_needed=0, device_available=None, host_needed=needed, host_available=available)


def test_ranks_of_one_host_share_its_memory_and_gpus_do_not() -> None:
    assert find_obstacle([on_gpu(100, 100), on_gpu(100, 100)], 0) is None
    assert find_obstacle([on_cpu("a", 100, 200), on_cpu("a", 100, 200)], 0) is None
    assert find_obstacle([on_cpu("a", 150, 200), on_cpu("b", 150, 200)], 0) is None
    message = find_obstacle([on_cpu("a", 100, 199), on_cpu("a", 100, 199)], 0)
    assert message is not None and "rank 0 needs 100 B (100 bytes) of host memory" in message and "has 99 B (99 bytes)" in message
    assert "(199 bytes) available to the 2 rank(s) of host a" in message and "start ranks on at least 2 hosts" in message


def test_the_number_of_ranks_that_would_do_is_stated() -> None:
    # 3 GiB of tables in two parts, 100 MiB of dense part on each GPU of 1 GiB: 924 MiB are left for tables
    message = find_obstacle([on_gpu(1636 * MIB, 1024 * MIB)] * 2, 100 * MIB)
    assert message is not None and "rank 0 needs 1.72 GB (1,715,470,336 bytes) of device memory" in message
    assert "and has 1.07 GB (1,073,741,824 bytes)" in message
    assert "start at least 4 ranks, a GPU of this size each" in message
    # together there is room, but one rank has the whole table
    message = find_obstacle([on_gpu(10, 1000), on_gpu(1010, 1000)], 10)
    assert message is not None and message.startswith("the model does not fit: rank 1 ") and "sharding row_wise" in message
    message = find_obstacle([on_gpu(2000, 1000)], 1500)
    assert message is not None and message.endswith("use a smaller dense part: --model.encoder.model-dim")


def train_and_open_with_less(rank: int, world_size: int, config: RunConfig) -> dict[str, str]:
    """Train, then evaluate and recommend where rank 1's host seems to have little memory left."""
    from gbla_rec.checkpoint import memory, sharding
    from gbla_rec.evaluation.evaluate import evaluate
    from gbla_rec.evaluation.recommend import Recommender
    from gbla_rec.training.trainer import train

    run_dir = train(config, device=torch.device("cpu"))
    told = {}
    available = memory.available_host_bytes

    def attempt(name: str, action: Any, limit: int) -> None:
        memory.available_host_bytes = lambda: limit if rank == 1 else available()
        memory.socket.gethostname = lambda: f"host-{rank}"
        with pytest.raises(ValueError) as refused:
            action()
        told[name] = str(refused.value)
        memory.available_host_bytes = available

    # a model that was made although it does not fit would be noticed
    build = sharding.DistributedModelParallel
    sharding.DistributedModelParallel = None  # type: ignore[misc]
    attempt("evaluate", lambda: evaluate(run_dir, device=torch.device("cpu")), 2 * MIB)
    attempt("recommend", lambda: Recommender.open(run_dir, torch.device("cpu")), 2 * MIB)
    sharding.DistributedModelParallel = build  # type: ignore[misc]
    memory.require_memory = sharding.require_memory = lambda *arguments: None
    attempt("read", lambda: Recommender.open(run_dir, torch.device("cpu")), MIB)
    return told


@pytest.mark.usefixtures("tiny_workspace")
def test_evaluation_and_recommendation_state_the_bytes_before_they_allocate(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run()
    # 2 tables of 2^16 x 8, in two parts: 2 MiB on each rank, and a moment for each row
    embedding = dataclasses.replace(config.model.embedding, rows_per_table=1 << 16, sharding="row_wise")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=1))
    first, second = run_ranks(train_and_open_with_less, 2, config)
    assert first == second
    for name in ("evaluate", "recommend"):
        match = re.search(
            r"rank 1 needs \S+ MB \((\S+) bytes\) of host memory .* and has \S+ MB \(2,097,152 bytes\) .*hosts with as much", first[name]
        )
        assert match, first[name]
        needed = int(match[1].replace(",", ""))
        tables = (1 << 16) * (8 + 1) * 4 + 1 * (8 + 1) * 4
        assert tables < needed < tables + 100_000
    assert re.search(r"rank 1 needs .* of host memory to read the largest piece of \S+step_00000001, and has", first["read"]), first["read"]


def test_a_cache_of_host_rows_takes_device_memory() -> None:
    placement = torch.distributed._remote_device("rank:0/cuda:0")
    spec = EnumerableShardingSpec([ShardMetadata(shard_offsets=[0, 0], shard_sizes=[1000, 16], placement=placement)])
    for kernel, device, host in (("fused", 68_000, 0), ("fused_uvm", 0, 68_000), ("fused_uvm_caching", 17_000, 68_000)):
        sharding = ParameterSharding("table_wise", kernel, [0], spec)
        plan = ShardingPlan({"tables": EmbeddingModuleShardingPlan({"t": sharding})})
        assert memory.shard_bytes(plan, 0, "cuda", 0.25) == (device, host)
