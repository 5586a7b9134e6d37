"""A workspace that cannot be used: the one line of an error names what failed, and the variable that chooses another workspace."""

import errno
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from gbla_apps import cli, prepare
from gbla_apps.command_line import run

CURE = "set GBLA_REC_WORKSPACE to a directory that can be written"
LOG = ["--recipe", "movielens_small"]
COMMANDS = [["prepare", *LOG], ["tokenize", *LOG], ["train", *LOG], ["evaluate"], ["recommend", "--user", "1"]]


@pytest.mark.timeout(60)
def test_a_workspace_below_a_file_is_named_by_every_command(launch_ranks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GBLA_REC_WORKSPACE", str(tmp_path / "file" / "workspace"))

    def all_commands(rank: int) -> None:
        for command in COMMANDS:
            sys.argv = ["gbla-rec", *command]
            with pytest.raises(SystemExit):
                cli.main()

    ((status, output),) = launch_ranks(all_commands, 1)
    assert status == 0, output
    wanted = f"; the workspace {tmp_path}/file/workspace cannot be made, for {tmp_path}/file is a file: {CURE}"
    assert [line.endswith(wanted) for line in output.splitlines() if line.startswith("error on rank 0: ")] == [True] * len(COMMANDS), output


@pytest.mark.timeout(60)
def test_both_ranks_of_a_run_that_finds_no_room_for_itself_name_the_cure(launch_ranks: Any, tiny_workspace: Path, tiny_run: Any) -> None:
    (tiny_workspace / "runs").touch()
    config = tiny_run()

    def train(rank: int) -> None:
        from gbla_rec.checkpoint.process_group import process_group
        from gbla_rec.training import trainer

        def start(arguments: object) -> None:
            with process_group() as device:
                trainer.train(config, device=device)

        run(start, [])

    for rank, (status, output) in enumerate(launch_ranks(train, 2, timeout_s=50)):
        assert status == 2, output
        said = output.splitlines()[-1]
        assert said.startswith(f"error on rank {rank}: ") and f"Not a directory: '{tiny_workspace}/runs/tiny" in said
        assert said.endswith(f"a part of the path is a file: remove it; or {CURE}")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, at: Path) -> str:
    """What ``prepare`` says where the system refuses to make the directory ``at``, and only that."""
    make = os.mkdir

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if Path(path) == at:
            raise OSError(number, os.strerror(number), str(path))
        make(path, *arguments, **options)

    monkeypatch.setattr(os, "mkdir", mkdir)
    with pytest.raises(SystemExit) as stopped:
        run(prepare.main, LOG)
    assert stopped.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.EACCES, "give this user the right to write there"),
        (errno.EPERM, "give this user the right to write there"),
        (errno.EROFS, "it is mounted read-only: mount it for writing"),
        (errno.EDQUOT, "your quota is used up: free space there"),
    ],
)
@pytest.mark.parametrize("at", ["datasets", ""])
def test_what_the_system_refuses_is_said_with_its_cure(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, cure: str, at: str
) -> None:
    assert refused(monkeypatch, capsys, number, workspace / at).endswith(f": '{workspace / at}'; {cure}; or {CURE}")


def test_a_directory_above_the_workspace_counts_and_any_other_place_does_not(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GBLA_REC_WORKSPACE", str(workspace / "a" / "b"))
    assert refused(monkeypatch, capsys, errno.EACCES, workspace).endswith(CURE)

    def fail(arguments: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(workspace.parent / "log.csv"))

    with pytest.raises(SystemExit):
        run(fail, [])
    assert capsys.readouterr().err == f"error: [Errno 13] Permission denied: '{workspace.parent}/log.csv'\n"


@pytest.mark.parametrize(
    ("number", "cure"),
    [
        (errno.ENOSPC, "free space there"),
        (errno.EDQUOT, "your quota is used up: free space there"),
        (errno.EFBIG, "the shell limits the size of files: ulimit -f unlimited"),
    ],
)
def test_a_write_that_finds_no_room_and_names_no_file_is_told_where_to_look(
    workspace: Path, capsys: pytest.CaptureFixture[str], number: int, cure: str
) -> None:
    def fail(arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(SystemExit):
        run(fail, [])
    wanted = f"no file is named; if it lies in the workspace {workspace}: {cure}; or {CURE}"
    assert capsys.readouterr().err == f"error: [Errno {number}] {os.strerror(number)}; {wanted}\n"
