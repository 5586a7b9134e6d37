"""SIGTERM that comes twice: at once it is one request, later it ends the process."""

import os
import signal
from pathlib import Path
from typing import Any


def get_sigterm_twice(rank: int, repeat_seconds: float | None, survived: Path) -> None:
    import torch.distributed as dist

    from gbla_rec.training import preemption

    if repeat_seconds is not None:
        preemption.REPEAT_SECONDS = repeat_seconds
    dist.init_process_group("gloo", rank=rank, world_size=1)
    with preemption.StopRequest() as stop_request:
        for _ in range(preemption.BATCHES_PER_CHECK):
            assert not stop_request.is_due()
        signal.raise_signal(signal.SIGTERM)
        assert list(stop_request.stop(iter(range(20)))) == list(range(preemption.BATCHES_PER_CHECK - 1))
        signal.raise_signal(signal.SIGTERM)
        survived.touch()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    os._exit(7)


def test_a_sigterm_repeated_at_once_is_the_same_request(launch_ranks: Any, tmp_path: Path) -> None:
    ((status, output),) = launch_ranks(get_sigterm_twice, 1, None, tmp_path / "survived")
    assert status == 7 and (tmp_path / "survived").exists(), output


def test_a_sigterm_after_the_interval_ends_the_process(launch_ranks: Any, tmp_path: Path) -> None:
    ((status, output),) = launch_ranks(get_sigterm_twice, 1, 0.0, tmp_path / "survived")
    assert status == -signal.SIGTERM and not (tmp_path / "survived").exists(), output
