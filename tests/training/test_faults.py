"""Ranks that really fail: whatever happens on one, all end soon, with one error that says what it was."""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec.checkpoint.rank_failure import SHARED_STORE_SWITCH, require_restartable
from gbla_rec.config import RunConfig

ROOT = Path(__file__).resolve().parents[2]


def command(config: RunConfig) -> None:
    """What ``gbla-rec train`` does after parsing."""
    from gbla_apps import command_line
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training.trainer import train

    def main(_: object) -> None:
        with process_group() as device:
            train(config, device=device)

    command_line.run(main, [])


def after_step(step: int, action: Callable[[], None]) -> None:
    """Call ``action`` on this rank once ``step`` steps are done."""
    from gbla_rec.training.step_guard import StepGuard

    watch = StepGuard.watch

    def watch_and_act(self: Any, done: int, position: Any) -> None:
        watch(self, done, position)
        if done == step:
            action()

    StepGuard.watch = watch_and_act  # type: ignore[method-assign]


def lose_shards(rank: int, config: RunConfig, how: str) -> None:
    """Rank 1 has a workspace of its own, as on a node's disk, whose shards go bad during the run."""
    if rank == 1:
        own = Path(os.environ["GBLA_REC_WORKSPACE"]).with_name("own")
        shutil.copytree(os.environ["GBLA_REC_WORKSPACE"], own)
        os.environ["GBLA_REC_WORKSPACE"] = str(own)

        def damage() -> None:
            for shard in own.glob("datasets/tiny/**/*.parquet"):
                if how == "deleted":
                    shard.unlink()
                else:
                    os.truncate(shard, shard.stat().st_size // 2)

        after_step(2, damage)
    command(config)


def fill_the_disk(rank: int, config: RunConfig) -> None:
    """The log of rank 0 is on a full disk from step 3 on."""
    from gbla_rec.training.progress import RunLog

    log = RunLog.training

    def log_to_a_full_disk(self: Any, step: int, *rates: Any, **values: Any) -> None:
        if self.enabled and step == 3:
            self._lines = open("/dev/full", "a", buffering=1)
        log(self, step, *rates, **values)

    RunLog.training = log_to_a_full_disk  # type: ignore[method-assign]
    command(config)


def meet_a_bug(rank: int, config: RunConfig) -> None:
    def bug() -> None:
        raise KeyError("no such thing")

    if rank == 1:
        after_step(2, bug)
    command(config)


@pytest.fixture
def long_run(tiny_run: Any, tiny_workspace: Path) -> RunConfig:
    training = dataclasses.replace(tiny_run().training, num_steps=500, save_every=1000, validate_every=1000, log_every=1)
    return tiny_run(training=training)


@pytest.mark.parametrize("how", ["deleted", "truncated"])
def test_a_shard_lost_on_one_rank_ends_all_and_is_named(launch_ranks: Any, long_run: RunConfig, how: str) -> None:
    started = time.monotonic()
    (first_status, first), (second_status, second) = launch_ranks(lose_shards, 2, long_run, how)
    assert time.monotonic() - started < 30
    assert first_status == second_status == 2, first + second
    (error,) = [line for line in second.splitlines() if line.startswith("error on rank 1: ")]
    assert "/own/datasets/tiny/" in error and ".parquet" in error and "prepare" in error, error
    assert "error on rank 0: lost the connection to another rank" in first
    assert "Traceback" not in first + second


def test_a_log_that_cannot_be_written_ends_all_ranks(launch_ranks: Any, long_run: RunConfig) -> None:
    (first_status, first), (second_status, second) = launch_ranks(fill_the_disk, 2, long_run)
    assert first_status == second_status == 2, first + second
    assert "error on rank 0: step 3 could not be logged to " in first and "make room, then train with --resume" in first
    assert "error on rank 1: lost the connection to another rank" in second
    assert "error on rank" not in first.replace("error on rank 0", "", 1)


def test_a_bug_on_one_rank_keeps_its_traceback_and_ends_all(launch_ranks: Any, long_run: RunConfig) -> None:
    (first_status, first), (second_status, second) = launch_ranks(meet_a_bug, 2, long_run)
    assert (first_status, second_status) == (2, 1), first + second
    assert "KeyError: 'no such thing'" in second and "Traceback" in second
    assert "error on rank 0: lost the connection to another rank" in first


def be_ended_by_the_launcher(rank: int, config: RunConfig) -> None:
    """Rank 1 fails; the launcher's SIGTERM reaches rank 0 after training gave up and before the error is shown."""
    from gbla_rec.checkpoint import process_group

    explain = process_group.explain

    def explain_late(error: BaseException) -> BaseException:
        os.kill(os.getpid(), signal.SIGTERM)
        return explain(error)

    if rank == 0:
        process_group.explain = explain_late
    meet_a_bug(rank, config)


def test_the_launchers_sigterm_does_not_hide_what_ended_a_rank(launch_ranks: Any, long_run: RunConfig) -> None:
    (status, output), _ = launch_ranks(be_ended_by_the_launcher, 2, long_run)
    assert status == 2 and "error on rank 0: lost the connection to another rank" in output, output


KILLED_PROGRAM = """
import os, pickle, signal, sys, time
from gbla_apps import command_line
from gbla_rec.checkpoint import background_save
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.training import trainer

config = pickle.load(open(sys.argv[1], "rb"))
forward, write = trainer.Trainer._forward, background_save.write_checkpoint
is_first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"


def write_without_end(run_dir, state, progress, group):
    if is_first and progress.step == 4:
        time.sleep(3600)
    return write(run_dir, state, progress, group)


def killed_forward(self, batch):
    loss, nll = forward(self, batch)
    # the other rank is in the middle of the step: it waits for this one in backward
    if is_first and self.step + 1 == 6 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return loss, nll


def main(_):
    with process_group() as device:
        trainer.train(config, device=device, resume=True)


trainer.Trainer._forward, background_save.write_checkpoint = killed_forward, write_without_end
command_line.run(main, [])
"""


def read_run(rank: int, world_size: int, config: RunConfig, is_trained: bool) -> dict[str, Any]:
    """Losses, and all tensors of the newest checkpoint as this rank loads them; trains first unless that was done."""
    from gbla_rec import workspace
    from gbla_rec.training.trainer import RunParts, Trainer, train

    if not is_trained:
        train(config, device=torch.device("cpu"))
    run_dir = workspace.latest_run_dir(config.name)
    trainer = Trainer(RunParts.open(config, torch.device("cpu")), run_dir)
    tensors = {**trainer.model.state_dict(), **trainer.optimizer.state_tensors()}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        **{name: value.local_shards()[0].tensor if hasattr(value, "local_shards") else value.detach() for name, value in tensors.items()},
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_rank_killed_in_a_step_is_restarted_and_the_result_is_that_of_an_undisturbed_run(
    run_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path
) -> None:
    embedding = dataclasses.replace(tiny_run().model.embedding, sharding="row_wise")
    training = dataclasses.replace(tiny_run().training, num_steps=8, async_save=True)
    config = tiny_run(name="killed", model=dataclasses.replace(tiny_run().model, embedding=embedding), training=training)
    (tmp_path / "program.py").write_text(KILLED_PROGRAM)
    (tmp_path / "config").write_bytes(pickle.dumps(config))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", "--monitor-interval", "0.1"]
    finished = subprocess.run(
        [sys.executable, "-m", *launcher, str(tmp_path / "program.py"), str(tmp_path / "config")],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", SHARED_STORE_SWITCH: "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    # the other rank ended by itself, although a save was pending there
    errors = finished.stderr
    assert "error on rank 0: lost the connection to another rank" in errors and "SIGKILL" not in errors, errors
    assert len(list(tiny_workspace.glob("runs/killed/*"))) == 1, "the restarted ranks go on with the same run"
    killed = run_ranks(read_run, 2, config, True)
    undisturbed = run_ranks(read_run, 2, dataclasses.replace(config, name="undisturbed"), False)
    for mine, theirs in zip(killed, undisturbed, strict=True):
        assert mine["losses"] == theirs["losses"] and len(mine.pop("losses")) == 8
        assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_restarts_that_would_fail_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    require_restartable()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "2")
    with pytest.raises(ValueError, match=f"got 2; set {SHARED_STORE_SWITCH}=1 "):
        require_restartable()
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "False")
    require_restartable()
