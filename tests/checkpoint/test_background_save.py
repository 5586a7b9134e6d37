"""Saving in the background: the same checkpoints, training goes on, and nothing saved is lost when disk or process fail."""

import dataclasses
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import checkpoints
from gbla_rec.config import RunConfig

CPU = torch.device("cpu")


def named(config: RunConfig, name: str, **training: Any) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, sharding="row_wise")
    training = dataclasses.replace(config.training, async_save=True, **training)
    return dataclasses.replace(config, name=name, training=training, model=dataclasses.replace(config.model, embedding=embedding))


def train_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU))


def resume_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU, resume=True))


def train_with_a_slow_writer(rank: int, world_size: int, config: RunConfig) -> tuple[list[int], str]:
    """Each write waits until training is two steps further, or at its end; returns by how many steps it was."""
    from gbla_rec.checkpoint import background_save
    from gbla_rec.training import trainer as module

    trainers, seen = [], []
    make, write = module.Trainer.__init__, background_save.write_checkpoint

    def make_and_keep(self: Any, *args: Any) -> None:
        make(self, *args)
        trainers.append(self)

    def wait_and_write(run_dir: Path, state: Any, progress: Any, group: Any) -> Path:
        deadline = time.monotonic() + 30
        while trainers[0].step < min(progress.step + 2, config.training.num_steps) and time.monotonic() < deadline:
            time.sleep(0.001)
        seen.append(trainers[0].step - progress.step)
        return write(run_dir, state, progress, group)

    module.Trainer.__init__ = make_and_keep  # type: ignore[method-assign]
    background_save.write_checkpoint = wait_and_write
    return seen, str(module.train(config, device=CPU))


@pytest.mark.usefixtures("tiny_workspace")
def test_training_goes_on_and_the_checkpoints_are_those_of_a_save_that_waits(run_ranks: Any, tiny_run: Any) -> None:
    config = named(tiny_run(), "background", num_steps=7, save_every=3, validate_every=7, keep_last=3)
    (seen, background), (_, _) = run_ranks(train_with_a_slow_writer, 2, config)
    assert seen[0] >= 2 and seen[1:] == [1, 0]
    waiting = dataclasses.replace(named(config, "waiting"), training=dataclasses.replace(config.training, async_save=False))
    waited = run_ranks(train_run, 2, waiting)[0]
    found = [checkpoints(Path(run_dir)) for run_dir in (background, waited)]
    assert [checkpoint.progress.step for checkpoint in found[0]] == [3, 6, 7]
    for mine, theirs in zip(*found, strict=True):
        digests = [checkpoint.progress.file_digests for checkpoint in (mine, theirs)]
        assert digests[0].keys() == digests[1].keys() and len(digests[0]) == 3
        # the metadata carry a random name of the save
        assert all(digests[0][name] == digests[1][name] for name in digests[0] if name.endswith(".distcp"))
        assert mine.progress.validation_nll == theirs.progress.validation_nll
    assert not list(Path(background).glob("checkpoints/.tmp-*"))


def train_while_the_disk_fills(rank: int, world_size: int, config: RunConfig) -> tuple[str, int]:
    """After the first save rank 1 can write no more than 1,024 bytes into a file; the error, and the step it came at."""
    from gbla_rec.checkpoint.background_save import BackgroundSaver
    from gbla_rec.training import trainer as module

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, steps = BackgroundSaver.save, []

    def save_and_fill(self: Any, run_dir: Path, model: Any, state: Any, progress: Any, and_then: Any) -> None:
        steps.append(progress.step)
        save(self, run_dir, model, state, progress, and_then)
        if len(steps) == 1:
            self.wait()
            if rank == 1:
                resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))

    BackgroundSaver.save = save_and_fill  # type: ignore[method-assign]
    with pytest.raises(OSError, match="could not be saved") as refused:
        module.train(config, device=CPU)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(refused.value), steps[-1]


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize(("num_steps", "told_at"), [(6, 6), (4, 4)])
def test_a_full_disk_is_told_at_the_next_save_or_at_the_end(run_ranks: Any, tiny_run: Any, num_steps: int, told_at: int) -> None:
    config = named(tiny_run(), "full", num_steps=num_steps, save_every=2, validate_every=num_steps)
    first, second = run_ranks(train_while_the_disk_fills, 2, config)
    assert first == second and first[1] == told_at
    assert "step_00000004 could not be saved: rank 1: " in first[0] and "make room, then train with --resume" in first[0]
    run_dir = workspace.latest_run_dir("full")
    assert [found.progress.step for found in checkpoints(run_dir)] == [2]
    assert not list(run_dir.glob("checkpoints/.tmp-*"))


def die_while_a_save_is_pending(rank: int, config: RunConfig) -> None:
    """The second save never ends; a step later rank 1 is killed."""
    import torch.distributed.checkpoint as dcp

    from gbla_apps import command_line
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training import trainer as module

    save, forward = dcp.save, module.Trainer._forward

    def save_half(state: Any, *, checkpoint_id: Path, process_group: Any) -> Any:
        metadata = save(state, checkpoint_id=checkpoint_id, process_group=process_group)
        if checkpoint_id.name.endswith("4"):
            time.sleep(3600)
        return metadata

    def forward_or_die(self: Any, batch: Any) -> Any:
        if rank == 1 and self.step == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward(self, batch)

    def main(_: object) -> None:
        with process_group() as device:
            module.train(config, device=device)

    dcp.save, module.Trainer._forward = save_half, forward_or_die  # type: ignore[method-assign]
    command_line.run(main, [])


@pytest.mark.timeout(120)
def test_a_kill_while_a_save_is_pending_loses_nothing_that_was_saved(
    launch_ranks: Any, run_ranks: Any, tiny_run: Any, tiny_workspace: Path
) -> None:
    config = named(tiny_run(), "killed", num_steps=6, save_every=2, validate_every=6)
    (first_status, first), (second_status, _) = launch_ranks(die_while_a_save_is_pending, 2, config, timeout_s=30.0)
    assert second_status == -signal.SIGKILL
    assert first_status == 2 and "lost the connection to another rank" in first, first
    run_dir = workspace.latest_run_dir("killed")
    assert [found.progress.step for found in checkpoints(run_dir)] == [2]
    assert list(run_dir.glob("checkpoints/.tmp-*"))
    run_ranks(resume_run, 2, config)
    assert [found.progress.step for found in checkpoints(run_dir)] == [4, 6]
    assert not list(run_dir.glob("checkpoints/.tmp-*"))


def stop_while_a_save_is_pending(rank: int, world_size: int, config: RunConfig) -> object:
    """Writing takes a second; SIGTERM comes before the third batch, while step 2 is being written."""
    from gbla_rec.checkpoint import background_save
    from gbla_rec.training import preemption
    from gbla_rec.training import trainer as module

    write, calls = background_save.write_checkpoint, iter(range(3))

    def write_slowly(*arguments: Any) -> Path:
        time.sleep(1)
        return write(*arguments)

    background_save.write_checkpoint = write_slowly
    preemption.StopRequest.is_due = lambda self: next(calls, None) is None  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as stopped:
        module.train(config, device=CPU)
    return stopped.value.code


@pytest.mark.usefixtures("tiny_workspace")
def test_sigterm_waits_for_what_is_pending(run_ranks: Any, tiny_run: Any) -> None:
    config = named(tiny_run(), "stopped", num_steps=9, save_every=2, validate_every=9)
    assert run_ranks(stop_while_a_save_is_pending, 1, config) == [143]
    assert [found.progress.step for found in checkpoints(workspace.latest_run_dir("stopped"))] == [2, 3]


def get_sigterm_while_the_last_save_is_awaited(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.checkpoint import background_save
    from gbla_rec.training import trainer

    leave, write = background_save.BackgroundSaver.__exit__, background_save.write_checkpoint
    is_left = threading.Event()

    def write_after_the_signal(*arguments: Any) -> Path:
        if arguments[2].step == config.training.num_steps:
            assert is_left.wait(30)
        return write(*arguments)

    def get_sigterm_and_leave(self: Any, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        is_left.set()
        leave(self, *arguments)

    background_save.write_checkpoint = write_after_the_signal
    background_save.BackgroundSaver.__exit__ = get_sigterm_and_leave  # type: ignore[method-assign]
    return str(trainer.train(config, device=CPU))


@pytest.mark.usefixtures("tiny_workspace")
def test_sigterm_while_the_last_save_is_awaited_loses_nothing(run_ranks: Any, tiny_run: Any) -> None:
    config = named(tiny_run(), "finished", num_steps=3, save_every=9, validate_every=9)
    (run_dir,) = run_ranks(get_sigterm_while_the_last_save_is_awaited, 1, config)
    assert [found.progress.step for found in checkpoints(Path(run_dir))] == [3]


def interrupt_while_a_save_is_pending(rank: int, world_size: int, config: RunConfig) -> list[int]:
    from gbla_rec.checkpoint import background_save
    from gbla_rec.training import step_window, trainer

    write, add = background_save.write_checkpoint, step_window.StepWindow.add

    def slow(*arguments: Any) -> Path:
        time.sleep(0.5)
        return write(*arguments)

    def interrupt(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        if len(interrupted) == 3:
            raise KeyboardInterrupt
        interrupted.append(1)

    interrupted: list[int] = []
    background_save.write_checkpoint = slow
    step_window.StepWindow.add = interrupt  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, device=CPU)
    return [checkpoint.progress.step for checkpoint in checkpoints(workspace.latest_run_dir(config.name))]


@pytest.mark.usefixtures("tiny_workspace")
def test_a_rank_alone_waits_for_its_save_whatever_ends_it(run_ranks: Any, tiny_run: Any) -> None:
    config = named(tiny_run(), "interrupted", num_steps=6, save_every=3, validate_every=6)
    assert run_ranks(interrupt_while_a_save_is_pending, 1, config) == [[3]]


def interrupt_the_wait_for_a_save(rank: int, world_size: int, config: RunConfig) -> list[int]:
    """Ctrl-C while the second save waits for the first."""
    import signal
    import threading

    from gbla_rec.checkpoint import background_save
    from gbla_rec.training import trainer

    write, wait, timers = background_save.write_checkpoint, background_save.BackgroundSaver.wait, []

    def slow(*arguments: Any) -> Path:
        time.sleep(1.5)
        return write(*arguments)

    def interrupted_wait(self: background_save.BackgroundSaver) -> None:
        if self._pending is not None and not timers:
            main = threading.main_thread().ident
            assert main is not None
            timers.append(threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT)))
            timers[0].start()
        wait(self)

    # a process that was started in the background ignores it
    signal.signal(signal.SIGINT, signal.default_int_handler)
    background_save.write_checkpoint = slow
    background_save.BackgroundSaver.wait = interrupted_wait  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.train(config, device=CPU)
    assert timers
    return [checkpoint.progress.step for checkpoint in checkpoints(workspace.latest_run_dir(config.name))]


@pytest.mark.usefixtures("tiny_workspace")
def test_a_save_whose_wait_is_interrupted_is_waited_for_before_the_lock_is_free(run_ranks: Any, tiny_run: Any) -> None:
    config = named(tiny_run(), "interrupted", num_steps=6, save_every=1, validate_every=6)
    assert run_ranks(interrupt_the_wait_for_a_save, 1, config) == [[1]]
