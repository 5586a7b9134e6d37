"""Titles are printed as they are; a wrong option is named before a model is made or loaded."""

import sys
from pathlib import Path

import pytest

from gbla_apps import evaluate, recommend, train
from gbla_rec.evaluation.recommend import Recommendation


def test_brackets_in_titles_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["[new] shoes", "a [/b] of one's own"]
    recommend.show(
        Recommendation(history_titles=titles, item_ids=["[x]1", "2"], titles=titles, scores=[-1.0, -2.0], ranked_by="generative")
    )
    printed = capsys.readouterr().out
    assert [printed.count(title) for title in titles] == [2, 2] and "[x]1" in printed


@pytest.mark.usefixtures("workspace")
def test_numbers_below_one_are_refused_by_their_option() -> None:
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        recommend.main(["--user", "1", "--count", "0"])
    with pytest.raises(ValueError, match="--num-beams must be at least 1, got -5"):
        evaluate.main(["--num-beams", "20", "-5"])


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("name", ["next.csv", "next.parquet.gz", "next", "parquet", "", "."])
def test_a_file_for_all_users_that_does_not_say_parquet_is_refused_before_there_is_a_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(--all-users\) must end in one of \('.parquet', '.pq'\), .*; name it as next_items\.parquet"):
        recommend.main(["--all-users", str(tmp_path / name) if name else name])
    assert not list(tmp_path.iterdir())
    for good in ("next.parquet", "next.PARQUET", "next.pq"):
        with pytest.raises(FileNotFoundError, match="no run"):
            recommend.main(["--all-users", str(tmp_path / good)])


@pytest.mark.usefixtures("workspace")
def test_a_profile_of_steps_that_never_come_is_refused() -> None:
    few_steps = ["--recipe", "movielens_small", "--training.num-steps", "6", "--training.profile-steps"]
    with pytest.raises(ValueError, match=r"--training.profile-steps must begin within the run, at step 6 .* or before, got '7:2'"):
        train.main([*few_steps, "7:2"])
    # the last step is one that comes: what is wrong here is that nothing was prepared
    with pytest.raises(FileNotFoundError, match="is not a prepared dataset"):
        train.main([*few_steps, "6:2"])


@pytest.mark.parametrize("arguments", [["--resume-step", "x"], ["--recipe"]])
def test_usage_names_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/lib/python3/pytest"])
    with pytest.raises(SystemExit):
        train.main(arguments)
    assert "gbla-rec train: error: argument --re" in capsys.readouterr().err
