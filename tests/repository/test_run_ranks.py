"""The ``run_ranks`` fixture: what every distributed test leans on."""

import gc
import os
import sys
import time
from pathlib import Path

import polars
import pytest
import torch
import torch.distributed as dist

SCALE = 10


def scaled_sum(rank: int, world_size: int, offset: int) -> torch.Tensor:
    value = torch.tensor([SCALE * rank + offset])
    dist.all_reduce(value)
    assert dist.get_world_size() == world_size
    return value


def test_each_rank_returns_its_value_and_shares_collectives(run_ranks):
    assert run_ranks(scaled_sum, 3, 1) == [torch.tensor([33])] * 3


def test_closures_the_environment_and_used_thread_pools_survive(run_ranks, monkeypatch):
    monkeypatch.setenv("GBLA_REC_TEST", "set after the server started")
    frame = polars.DataFrame({"a": range(1000)})
    expected = frame.lazy().group_by("a").len().collect().height

    def check(rank: int, world_size: int) -> tuple[str, int]:
        torch.ones(2, requires_grad=True).sum().backward()
        return os.environ["GBLA_REC_TEST"], frame.lazy().group_by("a").len().collect().height

    assert run_ranks(check, 2) == [("set after the server started", expected)] * 2


def test_ranks_come_from_a_server_that_started_no_thread_and_keep_its_objects_out_of_collections(run_ranks):
    def look(rank: int, world_size: int) -> tuple[list[str], list[str], bool]:
        server = Path(f"/proc/{os.getppid()}/status").read_text().split("\n")
        threads = [line.split()[1] for line in server if line.startswith("Threads:")]
        return threads, sorted({"polars", "pyarrow"} & sys.modules.keys()), gc.get_freeze_count() > 100_000

    assert run_ranks(look, 1) == [(["1"], [], True)]


def test_a_failing_rank_fails_the_test_at_once_and_shows_its_traceback(run_ranks):
    def fail_on_one(rank: int, world_size: int) -> None:
        print(f"rank {rank} was here", flush=True)
        # else rank 0 may still be joining the group when rank 1 leaves it
        dist.barrier()
        if rank == 1:
            raise ValueError("the reason")
        dist.barrier()

    start = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match=r"(?s)rank 0 was here.*rank 1 was here.*ValueError: the reason"):
        run_ranks(fail_on_one, 2)
    assert time.monotonic() - start < 30


def test_ranks_that_hang_are_ended(run_ranks):
    with pytest.raises(pytest.fail.Exception, match="did not end within 2 s"):
        run_ranks(lambda rank, world_size: time.sleep(60), 2, timeout_s=2)
