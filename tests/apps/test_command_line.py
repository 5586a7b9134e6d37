"""How a command ends: a rank among others at once, whatever threads it has."""

import importlib
import importlib.metadata
import os
import re
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
