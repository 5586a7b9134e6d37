"""An error in the options of a command with several ranks is shown once; one that a rank may meet alone is shown by that rank."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gbla_apps import shared_options as module
from gbla_apps.shared_options import shared_options

RECIPE = ["train", "--recipe", "movielens_small"]


def command(rank: int, arguments: list[str]) -> None:
    from gbla_apps import cli, shared_options

    shared_options.FIRST_RANK_SECONDS = 0.0
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
    assert first_status == second_status == 2, first + second
    assert first.count(shown) == 1 and second == ""


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
    assert first_status == second_status == 2, first + second
    assert first.count("error on rank 0: --joint-beams must be given for a run of objective 'joint' only") == 1 and second == ""


def test_the_first_rank_has_time_to_speak_before_the_launcher_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank, expected in (("0", []), ("1", [module.FIRST_RANK_SECONDS])):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises((SystemExit, ValueError)), shared_options():
            raise ValueError("count must be positive")
        assert slept == expected
    assert module.FIRST_RANK_SECONDS > 5
