"""Two trainings never write one run directory: real processes hold its lock, and lose it with their lives."""

import errno
import fcntl
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gbla_rec import workspace
from gbla_rec.config import RunConfig, TrainingConfig
from gbla_rec.data import file_lock
from gbla_rec.data.new_directory import new_directory

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import socket, sys, time
from pathlib import Path
from gbla_rec.checkpoint import run_lock

run_lock.on_first_rank = lambda action: action()
if len(sys.argv) > 2:
    run_lock._machine = lambda: sys.argv[2]
with run_lock.RunLock(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(100)
"""
FORKING = """
import os, sys, time
from pathlib import Path
from gbla_rec.checkpoint import run_lock

run_lock.on_first_rank = lambda action: action()
lock = run_lock.RunLock(Path(sys.argv[1]))
with lock:
    first = os.fork()
    if first == 0:
        # as one does that ends well
        lock.__exit__(None, None, None)
        os._exit(0)
    os.waitpid(first, 0)
    second = os.fork()
    if second:
        print(second, flush=True)
    time.sleep(100)
"""
ON_A_FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from gbla_apps import command_line
from gbla_rec.checkpoint import run_lock

run_lock.on_first_rank = lambda action: action()
# no file may grow beyond this: the system refuses writes as on a full disk
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
command_line.run(lambda _: run_lock.RunLock(Path(sys.argv[1])).__enter__(), [])
"""


@contextmanager
def holder(run_dir: Path, *machine: str) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock, of another ``machine`` if given; SIGKILLed at the end at the latest."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(run_dir), *machine], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        yield process
    finally:
        process.kill()
        process.wait()


def enter(rank: int, world_size: int, run_dir: Path, killed: int | None) -> tuple[str, float]:
    """The error of ``RunLock`` ("" if it could be entered) and the seconds that it took; rank 1 ends process ``killed`` meanwhile."""
    import threading

    from gbla_rec.checkpoint import run_lock

    run_lock.WAIT_SECONDS, run_lock.LEASE_SECONDS = (0.5, 1.5) if killed is None else (30.0, 30.0)
    if killed is not None and rank == 1:
        threading.Timer(0.5, os.kill, (killed, signal.SIGKILL)).start()
    started = time.monotonic()
    try:
        with run_lock.RunLock(run_dir):
            return "", time.monotonic() - started
    except BlockingIOError as error:
        return str(error), time.monotonic() - started


@pytest.mark.timeout(90)
def test_a_held_directory_is_refused_on_all_ranks_and_free_once_its_holder_is_killed(run_ranks: Any, tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        refused, same = run_ranks(enter, 2, tmp_path, None)
        told = (tmp_path / "ranks-0" / "0.output").read_text()
        # freed while another waits, which then needs no more than a look
        (first, seconds), (second, _) = run_ranks(enter, 2, tmp_path, process.pid)
    error = refused[0]
    assert same[0] == error and error.startswith(
        f"{tmp_path} is written by another training, process {process.pid} on host {os.uname().nodename}"
    )
    assert "end that one first" in error and "leave --resume out" in error
    assert 0.5 <= refused[1] < 1.5 and told.count("waiting up to") == 1
    assert first == second == "" and 0.2 < seconds < 10


@pytest.mark.timeout(60)
def test_a_holder_on_another_machine_is_waited_for_as_long_as_file_systems_keep_its_lock(run_ranks: Any, tmp_path: Path) -> None:
    with holder(tmp_path, "another"):
        ((error, seconds),) = run_ranks(enter, 1, tmp_path, None)
    assert "is written by another training" in error and seconds >= 1.5


@pytest.mark.timeout(60)
def test_a_forked_child_neither_frees_the_lock_nor_keeps_that_of_a_killed_parent(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", FORKING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    child = None
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert not is_free(tmp_path), "a child has closed its copy"
        parent.kill()
        parent.wait()
        assert is_free(tmp_path)
        os.kill(child, 0)
    finally:
        parent.kill()
        parent.wait()
        if child is not None:
            kill(child)


def is_free(run_dir: Path) -> bool:
    with (run_dir / "lock").open("a+") as file:
        return file_lock.take_lock(file)


@pytest.mark.timeout(60)
def test_a_lock_that_finds_no_room_is_named_with_the_cure(tmp_path: Path) -> None:
    program = [sys.executable, "-c", ON_A_FULL_DISK, str(tmp_path)]
    ended = subprocess.run(program, env={**os.environ, workspace.VARIABLE: str(tmp_path)}, capture_output=True, text=True, check=False)
    (error,) = ended.stderr.splitlines()
    assert ended.returncode == 2 and error.startswith("error: ") and f"{os.strerror(errno.EFBIG)}: '{tmp_path}/lock'; " in error, error
    assert is_free(tmp_path)


def resume_evaluate_and_train(rank: int, world_size: int, config: RunConfig, hold: Callable[[Path], Any]) -> dict[str, Any]:
    """Train a run; while another process holds it, resume and evaluate it; then resume it again."""
    import torch

    from gbla_rec.checkpoint import run_lock
    from gbla_rec.evaluation.evaluate import evaluate
    from gbla_rec.training.trainer import train

    run_lock.WAIT_SECONDS = 0.2
    cpu = torch.device("cpu")
    run_dir = train(config, device=cpu)
    with hold(run_dir):
        before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        with pytest.raises(BlockingIOError) as refused:
            train(config, device=cpu, resume=True)
        after = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
        evaluate(run_dir, device=cpu)
    return {"run": run_dir, "error": str(refused.value), "is_untouched": before == after, "again": train(config, device=cpu, resume=True)}


@pytest.mark.timeout(90)
@pytest.mark.usefixtures("tiny_workspace")
def test_a_run_that_is_written_is_evaluated_but_not_resumed(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(training=TrainingConfig(num_steps=2, save_every=1, log_every=1, validation_users=5))
    (found,) = run_ranks(resume_evaluate_and_train, 1, config, holder)
    assert found["error"].startswith(f"{found['run']} is written by another training") and found["is_untouched"]
    assert (found["run"] / "results.json").exists() and found["again"] == found["run"]


def fail_during_a_save(rank: int, world_size: int, config: RunConfig) -> list[tuple[bool, list[int]]]:
    """A bug ends training while a checkpoint is written: whether the lock is free, and the steps saved, before and after that is done."""
    import threading

    import torch

    from gbla_rec.checkpoint.background_save import BackgroundSaver
    from gbla_rec.training.trainer import Trainer, train

    write, save, may_write = BackgroundSaver._write, Trainer._save, threading.Event()

    def wait_and_write(*arguments: Any) -> None:
        assert may_write.wait(60)
        write(*arguments)

    def save_and_fail(self: Trainer, validation_nll: float | None) -> None:
        save(self, validation_nll)
        raise KeyError("a bug")

    BackgroundSaver._write = wait_and_write  # type: ignore[method-assign, assignment]
    Trainer._save = save_and_fail  # type: ignore[method-assign]
    with pytest.raises(KeyError, match="a bug"):
        train(config, device=torch.device("cpu"))
    if rank > 0:
        may_write.set()
        return []
    run_dir = workspace.run_dirs(config.name)[0]
    before = is_free(run_dir), workspace.checkpoint_steps(run_dir)
    may_write.set()
    deadline = time.monotonic() + 30
    while not (workspace.checkpoint_steps(run_dir) and is_free(run_dir)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [before, (is_free(run_dir), workspace.checkpoint_steps(run_dir))]


@pytest.mark.timeout(90)
@pytest.mark.usefixtures("tiny_workspace")
def test_the_lock_outlives_a_training_that_leaves_a_save_behind(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run(training=TrainingConfig(num_steps=4, save_every=2, log_every=1, validation_users=5, async_save=True))
    first, _ = run_ranks(fail_during_a_save, 2, config)
    assert first == [(False, []), (True, [2])]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_warned_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse(monkeypatch, number)
    monkeypatch.setattr(file_lock, "_warned_of", set())
    with (tmp_path / "lock").open("a+") as file:
        assert file_lock.take_lock(file) and file_lock.take_lock(file)
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").touch()
    assert (tmp_path / "out" / "file").exists()
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{tmp_path}/lock cannot be locked ({os.strerror(number)})")


def test_another_error_of_a_lock_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.EIO)
    with (tmp_path / "lock").open("a+") as file, pytest.raises(OSError, match="Input/output error"):
        file_lock.take_lock(file)


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


PROGRAM = """
import os, pickle, sys
from pathlib import Path
from gbla_apps import command_line
from gbla_rec.checkpoint import run_lock
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.training import trainer

config = pickle.load(open(sys.argv[1], "rb"))
run_lock.WAIT_SECONDS = float(sys.argv[2])
Path(sys.argv[1]).with_name("pid." + os.environ["RANK"]).write_text(str(os.getpid()))


def main(_):
    with process_group() as device:
        trainer.train(config, device=device, resume=True)


command_line.run(main, [])
"""


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_ranks_that_outlive_their_torchrun_keep_the_run_until_they_are_killed(
    launch_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path
) -> None:
    endless = tiny_run(name="orphan", training=TrainingConfig(num_steps=1_000_000, save_every=2, log_every=1, validation_users=5))
    (tmp_path / "config").write_bytes(pickle.dumps(endless))
    (tmp_path / "program.py").write_text(PROGRAM)
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(tmp_path / "program.py")]
    torchrun = subprocess.Popen(
        [sys.executable, "-m", *launcher, str(tmp_path / "config"), "5"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: bool(newest_steps(tiny_workspace)), torchrun)
        torchrun.kill()
        torchrun.wait()
        before = newest_steps(tiny_workspace)[-1]
        ((status, output),) = launch_ranks(resumed, 1, endless)
        pids = {rank: int((tmp_path / f"pid.{rank}").read_text()) for rank in range(2)}
        assert newest_steps(tiny_workspace)[-1] > before, "the ranks went on"
        assert status == 2 and f"is written by another training, process {pids[0]} on host" in output, output
        os.kill(pids[0], signal.SIGKILL)
        killed = time.monotonic()
        ((status, output),) = launch_ranks(resumed, 1, endless, True)
        assert status == 0 and "resumed from" in output and "waiting" not in output, output
        assert time.monotonic() - killed < 40
    finally:
        torchrun.kill()
        torchrun.wait()
        for path in tmp_path.glob("pid.*"):
            kill(int(path.read_text()))


def resumed(rank: int, config: RunConfig, is_short: bool = False) -> None:
    """``gbla-rec train --resume``; if ``is_short``, it ends before its first step."""
    from gbla_apps import command_line
    from gbla_rec.checkpoint import run_lock
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training.trainer import Trainer, train

    run_lock.WAIT_SECONDS = 1.0

    def main(_: object) -> None:
        with process_group() as device:
            train(config, device=device, resume=True)

    if is_short:
        Trainer._train = lambda *_: None  # type: ignore[method-assign]
    command_line.run(main, [])


def newest_steps(workspace: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step_")) for path in workspace.glob("runs/orphan/*/checkpoints/step_*/progress.json"))


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
