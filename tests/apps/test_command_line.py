"""How a command ends: a rank among others at once, whatever threads it has."""

import importlib
import importlib.metadata
import os
import re
import signal
import subprocess
import sys

import pytest

PROGRAM = """
import sys, threading, time
from gbla_apps import command_line


def main(arguments):
    threading.Thread(target=time.sleep, args=(60,)).start()
    print("half a line", end="")
    raise {error}("what went wrong")


command_line.run(main, [])
"""


@pytest.mark.timeout(40)
@pytest.mark.parametrize(
    ("error", "status", "shown"), [("ValueError", 2, "error on rank 1: what went wrong"), ("KeyError", 1, "Traceback")]
)
def test_a_failed_rank_ends_before_its_threads(error: str, status: int, shown: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(error=error)],
        env={**os.environ, "RANK": "1", "WORLD_SIZE": "2"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert finished.returncode == status and shown in finished.stderr and "what went wrong" in finished.stderr
    assert finished.stdout == "half a line"


UNREAD = """
import os, sys
from gbla_apps import command_line


def main(arguments):
    {body}


command_line.run(main, [])
"""
OTHER_PIPE = "ends = os.pipe(); os.close(ends[0]); os.write(ends[1], b'x')"


def ended_without_a_reader(arguments: list[str], unbuffered: bool, reads: bool = False) -> tuple[int, str]:
    reader, writer = os.pipe()
    if not reads:
        os.close(reader)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    if unbuffered:
        environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, *arguments]
    try:
        finished = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=30, check=False)
    finally:
        os.close(writer)
        if reads:
            os.close(reader)
    return finished.returncode, finished.stderr


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unbuffered", [True, False])
def test_a_command_whose_output_nobody_reads_ends_quietly(unbuffered: bool) -> None:
    quiet = (128 + signal.SIGPIPE, "")
    assert ended_without_a_reader(["-m", "gbla_apps.cli", "--help"], unbuffered) == quiet
    for body in ("print('a line')", "print('x' * 100_000)", "print('a line'); sys.exit(0)"):
        assert ended_without_a_reader(["-c", UNREAD.format(body=body)], unbuffered) == quiet, body


@pytest.mark.timeout(30)
def test_another_pipe_that_breaks_is_an_error_as_before() -> None:
    found = ended_without_a_reader(["-c", UNREAD.format(body=OTHER_PIPE)], unbuffered=False, reads=True)
    assert found == (2, "error: [Errno 32] Broken pipe\n")


@pytest.mark.parametrize("app", ["train", "evaluate", "recommend"])
def test_torchrun_leaves_every_option_to_the_app(app: str, capsys: pytest.CaptureFixture[str]) -> None:
    from torch.distributed.run import parse_args

    module = importlib.import_module(f"gbla_apps.{app}")
    with pytest.raises(SystemExit):
        module.main(["--recipe", "movielens_small", "--help"] if app == "train" else ["--help"])
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*", capsys.readouterr().out)) - {"--help"}
    assert "--recipe" in options
    for option in options:
        assert parse_args(["-m", f"gbla_apps.{app}", option, "x"]).training_script_args == [option, "x"]


def test_the_version_is_that_of_the_installed_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from gbla_apps import cli

    monkeypatch.setattr(sys, "argv", ["gbla-rec", "--version"])
    cli.main()
    assert capsys.readouterr().out == f"gbla-rec {importlib.metadata.version('gbla-rec')}\n"
