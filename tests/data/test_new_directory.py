"""A prepared dataset appears whole or not at all, whatever stops the work."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import gbla_rec.data.prepare as prepare_module
from gbla_rec.config import PrepareConfig
from gbla_rec.data.new_directory import LOCK_NAME, new_directory
from gbla_rec.data.prepare import prepare

Listing = Callable[[Path], list[str]]
CHILD = """
import signal, sys, time
from pathlib import Path
import gbla_rec.data.prepare as prepare_module
from gbla_rec.config import PrepareConfig
directory, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "hang":
    write_shard = prepare_module.write_shard
    def write_and_hang(path, shard):
        write_shard(path, shard)
        (directory / "written").touch()
        time.sleep(100)
    prepare_module.write_shard = write_and_hang
else:
    # no file may grow beyond this: the system refuses writes as on a full disk
    import resource
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(mode), int(mode)))
prepare_module.prepare(PrepareConfig(name="test", events=directory / "log.parquet", max_events_per_shard=20_000), directory / "out")
"""


@pytest.fixture
def log_directory(tmp_path: Path) -> Path:
    """A directory with ``log.parquet`` and a config for it."""
    rng = np.random.default_rng(0)
    size = 50_000
    columns = {name: rng.integers(0, 2**62, size) for name in ("item_id", "timestamp")}
    pl.DataFrame({"user_id": rng.integers(0, 100, size), **columns}).write_parquet(tmp_path / "log.parquet")
    return tmp_path


def config_of(directory: Path) -> PrepareConfig:
    return PrepareConfig(name="test", events=directory / "log.parquet")


@pytest.mark.parametrize("step", ["open_events", "build_vocabulary", "write_shard", "_write_items", "_manifest"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_an_interruption_leaves_nothing(
    log_directory: Path, listing: Listing, monkeypatch: pytest.MonkeyPatch, step: str, error: type[BaseException]
) -> None:
    def interrupt(*_: object) -> None:
        raise error("stop")

    monkeypatch.setattr(prepare_module, step, interrupt)
    with pytest.raises(error, match="stop"):
        prepare(config_of(log_directory), log_directory / "out")
    assert listing(log_directory) == ["log.parquet"]


def test_a_killed_run_leaves_one_hidden_directory_that_the_next_run_deletes(log_directory: Path, listing: Listing) -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(log_directory), "hang"])
    try:
        deadline = time.monotonic() + 60
        while not (log_directory / "written").exists():
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    (leftover,) = [name for name in listing(log_directory) if name.startswith(".tmp-out-")]
    assert listing(log_directory) == [leftover, "log.parquet", "written"]
    prepare(config_of(log_directory), log_directory / "out").verify()
    assert listing(log_directory) == ["log.parquet", "out", "written"]


@pytest.mark.parametrize("limit", [100_000, 420_000])
def test_a_full_disk_is_an_error_and_leaves_nothing(log_directory: Path, listing: Listing, limit: int) -> None:
    child = subprocess.run([sys.executable, "-c", CHILD, str(log_directory), str(limit)], capture_output=True, text=True, check=False)
    assert child.returncode == 1
    assert child.stderr.splitlines()[-1] == f"OSError: [Errno 27] File too large: '{log_directory}/out'"
    assert listing(log_directory) == ["log.parquet"]


def test_a_live_run_is_left_alone(tmp_path: Path, listing: Listing) -> None:
    with new_directory(tmp_path / "out") as one:
        with pytest.raises(RuntimeError), new_directory(tmp_path / "out") as other:
            assert listing(tmp_path) == sorted([one.name, other.name])
            raise RuntimeError
        assert listing(tmp_path) == [one.name]
        (one / "file").write_text("content")
    assert listing(tmp_path) == ["out"]
    assert listing(tmp_path / "out") == ["file"]


def test_of_two_runs_at_once_the_second_to_finish_is_refused(tmp_path: Path, listing: Listing) -> None:
    with pytest.raises(FileExistsError, match="exists"), new_directory(tmp_path / "out") as one:
        (one / "winner").write_text("no")
        with new_directory(tmp_path / "out") as other:
            (other / "winner").write_text("yes")
    assert listing(tmp_path) == ["out"]
    assert (tmp_path / "out" / "winner").read_text() == "yes"


@pytest.mark.parametrize("is_link", [False, True])
def test_an_output_that_is_there_is_refused_before_the_work_with_the_cure(tmp_path: Path, listing: Listing, is_link: bool) -> None:
    output = tmp_path / "out"
    if is_link:
        output.symlink_to(tmp_path / "nowhere")
    else:
        output.mkdir()
    with pytest.raises(FileExistsError, match=f"^{output} exists; delete it or choose another name$"), new_directory(output):
        pytest.fail("the work began")
    assert listing(tmp_path) == ["out"]


def test_directories_of_other_outputs_are_left_alone(tmp_path: Path, listing: Listing) -> None:
    for name in (".tmp-out2-abc", ".tmp-out-mine", "out3"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-out2-abc" / LOCK_NAME).touch()
    with new_directory(tmp_path / "out"):
        pass
    # .tmp-out-mine has no lock file: it may be a run that just began
    assert listing(tmp_path) == [".tmp-out-mine", ".tmp-out2-abc", "out", "out3"]


def test_the_directory_follows_the_umask_and_parents_are_made(tmp_path: Path) -> None:
    with new_directory(tmp_path / "a" / "b" / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "a" / "b" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
