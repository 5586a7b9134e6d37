"""An error in the options of a command with several ranks is shown once; one that a rank may meet alone is shown by that rank."""

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gbla_apps import command_line
from gbla_apps import shared_options as module
from gbla_apps.shared_options import shared_options

RECIPE = ["train", "--recipe", "movielens_small"]


ENDED = 143
"""Exit status of a rank that a launcher ends."""


def command(rank: int, arguments: list[str], is_ended: bool = True) -> None:
    """``gbla-rec``; whether a rank that waits to be ended is."""
    from gbla_apps import cli

    time.sleep = lambda _: os._exit(ENDED) if is_ended else None
    sys.argv = ["gbla-rec", *arguments]
    cli.main()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["train", "--recipe", "nonsense"], "error on rank 0: recipe must be one of"),
        (["train"], "error on rank 0: --recipe must be given"),
        # argparse, and tyro, end the program themselves
        (["train", "--resume-step", "x"], "argument --resume-step: invalid int value"),
        ([*RECIPE, "--training.num-steps", "x"], "Error parsing --training.num-steps"),
        ([*RECIPE, "--training.profile-steps", "1000000"], "error on rank 0: --training.profile-steps must begin within the run"),
        (["evaluate", "--num-beams", "0"], "error on rank 0: --num-beams must be at least 1"),
        (["recommend", "--user", "1", "--count", "0"], "error on rank 0: --count must be at least 1"),
    ],
)
def test_wrong_options_are_shown_by_the_first_rank_alone(launch_ranks: Any, workspace: Path, arguments: list[str], shown: str) -> None:
    (first_status, first), (second_status, second) = launch_ranks(command, 2, arguments)
    assert (first_status, second_status) == (2, ENDED), first + second
    assert first.count(shown) == 1 and second == ""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["evaluate", "--num-beams", "0"], "error on rank 1: --num-beams must be at least 1"),
        (["train", "--resume-step", "x"], "argument --resume-step: invalid int value"),
        ([*RECIPE, "--training.num-steps", "x"], "Error parsing --training.num-steps"),
    ],
)
def test_a_rank_that_nobody_ends_says_what_is_wrong(launch_ranks: Any, workspace: Path, arguments: list[str], shown: str) -> None:
    _, (status, output) = launch_ranks(command, 2, arguments, False)
    assert status == 2 and output.count(shown) == 1, output


@pytest.mark.timeout(60)
def test_help_is_shown_once(launch_ranks: Any) -> None:
    (first_status, first), (second_status, second) = launch_ranks(command, 2, [*RECIPE, "--help"])
    assert (first_status, second_status) == (0, 0) and first.count("usage: gbla-rec train") == 1 and second == ""


@pytest.mark.timeout(60)
def test_what_a_rank_may_meet_alone_is_shown_by_every_rank(launch_ranks: Any, workspace: Path) -> None:
    for rank, (status, output) in enumerate(launch_ranks(command, 2, ["evaluate", "--name", "shop"])):
        assert status == 2 and f"error on rank {rank}: no run called 'shop'" in output
    config = workspace / "runs" / "shop" / "1" / "config.json"
    config.parent.mkdir(parents=True)
    config.write_text("{")
    for rank, (status, output) in enumerate(launch_ranks(command, 2, ["evaluate", "--run-dir", str(config.parent)])):
        assert status == 2 and f"error on rank {rank}: {config} cannot be read" in output


@pytest.mark.timeout(60)
def test_options_that_a_run_refuses_are_shown_once(launch_ranks: Any, tiny_run: Any, workspace: Path) -> None:
    from gbla_rec.checkpoint.run_directory import create_run

    create_run(workspace / "runs" / "shop" / "1", tiny_run(), "", "")
    arguments = ["evaluate", "--run-dir", str(workspace / "runs" / "shop" / "1"), "--joint-beams", "50"]
    (first_status, first), (second_status, second) = launch_ranks(command, 2, arguments)
    assert (first_status, second_status) == (2, ENDED), first + second
    assert first.count("error on rank 0: --joint-beams must be given for a run of objective 'joint' only") == 1 and second == ""


def test_only_a_later_rank_waits_for_the_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    # a variable that is left over makes no rank of a process that is alone
    for rank, world_size, expected in (("0", "2", []), ("3", None, []), ("3", "1", []), ("1", "2", [module.FIRST_RANK_SECONDS])):
        monkeypatch.setenv("RANK", rank)
        if world_size is None:
            monkeypatch.delenv("WORLD_SIZE", raising=False)
        else:
            monkeypatch.setenv("WORLD_SIZE", world_size)
        with pytest.raises(ValueError, match="count must be positive"), shared_options():
            print("printed")
            raise ValueError("count must be positive")
        assert slept == expected and capsys.readouterr().out == ("" if expected else "printed\n")
    assert module.FIRST_RANK_SECONDS > 5


def test_a_process_alone_prints_whatever_rank_it_is_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "3")
    for world_size, expected in (("2", ""), ("1", "text\n")):
        monkeypatch.setenv("WORLD_SIZE", world_size)
        command_line.print_once("text")
        assert capsys.readouterr().out == expected
