"""The command line: help a person can read, one line for an error, and the whole path in real processes."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gbla_apps import cli, command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_rec.recipes import DATASETS, RECIPES, recipe

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, ok: bool = True) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        [sys.executable, "-m", "gbla_apps.cli", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert (finished.returncode == 0) == ok, finished.stdout + finished.stderr
    return finished


def command(rank: int, arguments: list[str]) -> None:
    sys.argv = ["gbla-rec", *arguments]
    cli.main()


@pytest.fixture
def run_forked(launch_ranks: Any) -> Callable[..., str]:
    """``run_forked(*arguments, status=0)``: what a command prints, in a process that has torchrec already, which takes seconds."""

    def forked(*arguments: str, status: int = 0) -> str:
        ((found, output),) = launch_ranks(command, 1, list(arguments), timeout_s=240.0)
        assert found == status, output
        return str(output)

    return forked


@pytest.mark.timeout(60)
def test_data_without_validation_users_are_refused_before_a_step_is_made(workspace: Path, run_forked: Callable[..., str]) -> None:
    # two events each: no event is left before a validation target
    log = pl.DataFrame({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 2, 1], "timestamp": [1, 2, 1, 2]})
    log.write_parquet(workspace.parent / "log.parquet")
    pl.DataFrame({"item_id": [1, 2], "title": ["same", "same"]}).write_parquet(workspace.parent / "items.parquet")
    files = ("--events", str(workspace.parent / "log.parquet"), "--items", str(workspace.parent / "items.parquet"))
    said = run_forked("prepare", "--name", "short", *files)
    assert "warning: no user has validation targets and events before them: train and evaluate" in said
    data = ("--recipe", "own_data", "--dataset", "short")
    said = run_forked("tokenize", *data)
    assert "100% of the items had the codes of another one" in said and "warning: the codes say little about the items" in said
    assert "do not begin alike" not in said
    pl.DataFrame({"item_id": [1, 2], "title": ["red shoes", "green hats"]}).write_parquet(workspace.parent / "items.parquet")
    run_forked("prepare", "--name", "told_apart", *files)
    said = run_forked("tokenize", "--recipe", "own_data", "--dataset", "told_apart")
    assert "no item had the codes of another one" in said
    assert "a dataset has one set of semantic IDs" in run_forked("tokenize", "--recipe", "own_data", "--dataset", "told_apart", status=2)
    assert "2 items have 2 different first codes; give a smaller --semantic-ids.codebook-width, such as 2," in said
    assert "dataset 'short' must have users with validation targets" in run_forked("train", *data, "--name", "short", status=2)
    assert not (workspace / "runs").exists()


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.usefixtures("workspace")
def test_the_whole_path_on_a_log_of_ones_own(tmp_path: Path, run_forked: Callable[..., str]) -> None:
    rows = [(f"u{u}", f"i{(u + k) % 40}", 1000 * u + k, "ab"[k % 2], k % 3) for u in range(30) for k in range(12)]
    pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "device", "price"], orient="row").write_csv(tmp_path / "events.csv")
    names = [f"thing {i // 4} no {i}" for i in range(40)]
    pl.DataFrame({"item_id": [f"i{i}" for i in range(40)], "name": names}).write_csv(tmp_path / "items.csv")
    log = ["--events", str(tmp_path / "events.csv"), "--items", str(tmp_path / "items.csv"), "--context-columns", "device", "price"]
    assert "30 users, 40 items, 360 events" in run("prepare", "--name", "shop", *log).stdout
    mine = ["--recipe", "movielens_small", "--name", "shop", "--dataset", "shop"]
    ids = ["--semantic-ids.embedding", "text", "--semantic-ids.embedding-dim", "8"]
    run_forked("tokenize", *mine, *ids)
    short = ["--training.num-steps", "4", "--training.validate-every", "2", "--training.save-every", "2"]
    short += ["--model.embedding.context-features", "device", "--model.embedding.rows-per-table", "64", "--stream.tokens-per-batch", "300"]
    refused = run_forked("train", *mine, *short, status=2)
    assert "train with --semantic-ids.embedding text --semantic-ids.embedding-dim 8, or remove" in refused
    assert "no run" in run_forked("evaluate", status=2), "a run that could not start must leave nothing behind"
    trained = run("train", *mine, *ids, *short)
    assert "validation NLL" in trained.stderr
    assert "does not read: price (--model.embedding.context-features device price)" in trained.stderr
    again = run("prepare", "--name", "shop", *log, ok=False)
    assert again.returncode == 2
    assert again.stderr.startswith("error: ") and "Traceback" not in again.stderr
    evaluated = run_forked("evaluate", "--recipe", "shop", "--both-histories", "--num-beams", "60", "10")
    assert re.search(r"most-popular .* item-kNN", evaluated)
    assert "own history kept" in evaluated and "own history removed" in evaluated
    assert re.search(r"│ 10 .*\n│ 60 ", evaluated)
    compared = run_forked("compare", "shop", "--history", "kept", "shop", "--output", str(tmp_path / "same"))
    assert "+0.0000 to" in compared
    assert json.loads((tmp_path / "same" / "comparison.json").read_text())[0]["metrics"]["Recall@10"]["difference"] == 0
    assert "both --a RUN [RUN ...] and --b RUN [RUN ...], got --a" in run_forked("compare", "--a", "shop", status=2)
    assert "two or more RUN, or as both --a" in run_forked("compare", status=2)
    run_forked("report", "--runs", "shop", "--output", str(tmp_path / "page"))
    assert "<svg" not in (page := (tmp_path / "page" / "report.html").read_text()) and page.count("data:image/svg+xml") >= 5
    recommended = run_forked("recommend", "--user", "u3", "--count", "3")
    assert len(re.findall(r"thing \d no \d+", recommended)) >= 3
    unknown = run_forked("recommend", "--history", "thing 1", status=2)
    assert "names no item of the dataset; did you mean one of" in unknown
    everyone = tmp_path / "new" / "items.parquet"
    written = run_forked("recommend", "--all-users", str(everyone), "--count", "3")
    assert f"written to {everyone}: 30 users" in written
    one = pl.read_parquet(everyone).row(by_predicate=pl.col("user_id") == "u3", named=True)
    assert len(one["item_ids"]) == 3 and all(str(item) in recommended for item in one["item_ids"])
    refused = run_forked("recommend", "--all-users", str(everyone), status=2)
    assert f"output (--all-users): {everyone} exists; delete it or choose another name" in refused
    assert "user_id (--user) must be a user of " in run_forked("recommend", "--user", "nobody", status=2)


TINY = """--recipe movielens_small --dataset tiny --semantic-ids.embedding text --semantic-ids.embedding-dim 8
    --semantic-ids.min-codebook-width 8 --semantic-ids.dedup-width 8 --semantic-ids.kmeans-iterations 5 --semantic-ids.num-levels 3
    --semantic-ids.codebook-width None --model.embedding.context-features kind --model.embedding.rows-per-table 64
    --stream.tokens-per-batch 300 --training.validate-every 40 --training.save-every 10 --training.log-every 1
    --training.num-steps 40""".split()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_9_and_resume_reach_the_result_of_an_undisturbed_run(
    tiny_workspace: Path, run_forked: Callable[..., str], start_rank: Any
) -> None:
    run_forked("train", *TINY, "--name", "whole")
    process, output = start_rank(command, ["train", *TINY, "--name", "killed"])
    deadline = time.monotonic() + 120
    while not list(tiny_workspace.glob("runs/killed/*/checkpoints/step_*/progress.json")):
        assert process.is_alive() and time.monotonic() < deadline, output.read_text()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -9
    # what a kill in the middle of a save leaves behind
    (checkpoint,) = sorted(tiny_workspace.glob("runs/killed/*/checkpoints/step_*"))[-1:]
    checkpoint.with_name(".tmp-step_00000099").mkdir()
    run_forked("train", *TINY, "--name", "killed", "--resume")
    whole, killed = (logged(tiny_workspace, name) for name in ("whole", "killed"))
    assert [line["step"] for line in killed] == [line["step"] for line in whole]
    for key in ("loss", "nll"):
        before, after = ([line[key] for line in lines if key in line] for lines in (whole, killed))
        assert before and after == pytest.approx(before, rel=1e-9)
    assert not list(tiny_workspace.glob("runs/killed/*/checkpoints/.tmp-*"))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_sigterm_saves_and_resume_reaches_the_result_of_an_undisturbed_run(tiny_workspace: Path, run_forked: Callable[..., str]) -> None:
    unsaved = [*TINY, "--training.save-every", "1000", "--training.validate-every", "1000", "--training.num-steps", "60"]
    run_forked("train", *unsaved, "--name", "whole")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, start in (("alone", ["gbla_apps.train"]), ("pair", [*launcher, "-m", "gbla_apps.train"])):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", *start, *unsaved, "--name", name], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        while not any(path.read_text() for path in tiny_workspace.glob(f"runs/{name}/*/metrics.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.terminate()
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 143 if name == "alone" else process.returncode != 0
        (saved,) = tiny_workspace.glob(f"runs/{name}/*/checkpoints/step_*")
        step = int(saved.name.removeprefix("step_"))
        assert 0 < step < 60
        assert f"SIGTERM: saved step {step}" in " ".join(errors.split()) and "--resume" in errors
    run_forked("train", *unsaved, "--name", "pair", "--resume")
    whole, stopped = (logged(tiny_workspace, name) for name in ("whole", "pair"))
    assert [line["step"] for line in stopped] == [line["step"] for line in whole]
    losses, again = ([line["loss"] for line in lines if "loss" in line] for lines in (whole, stopped))
    assert again == pytest.approx(losses, rel=2e-5)


def logged(workspace: Path, name: str) -> list[dict[str, Any]]:
    (path,) = workspace.glob(f"runs/{name}/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_a_diverged_run_stops_before_it_saves(tiny_workspace: Path, run_forked: Callable[..., str]) -> None:
    stopped = run_forked("train", *TINY, "--name", "wild", "--optimizer.learning-rate", "1e30", "--training.log-every", "1000", status=2)
    assert "is not finite" in stopped and "nothing was saved since" in " ".join(stopped.split())
    assert not list(tiny_workspace.glob("runs/wild/*/checkpoints/step_*"))
    assert "no run called 'wild' has a checkpoint yet" in run_forked("evaluate", "--recipe", "wild", status=2)


@pytest.mark.slow
def test_weights_that_validate_to_nan_are_not_saved(tiny_workspace: Path, run_forked: Callable[..., str]) -> None:
    often = ["--training.validate-every", "1", "--training.save-every", "1"]
    stopped = run_forked("train", *TINY, *often, "--name", "nan", "--optimizer.learning-rate", "1e30", status=2)
    error = " ".join(stopped.split())
    assert "the validation NLL after step 1 is nan: the weights have diverged, and were not saved; start a new run with" in error
    assert not list(tiny_workspace.glob("runs/nan/*/checkpoints/step_*"))


def test_help_names_the_commands_and_their_options(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gbla-rec", "--help"])
    cli.main()
    overview = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert command in overview
        monkeypatch.setattr(sys, "argv", ["gbla-rec", command, "--help"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 0
        assert "usage: gbla-rec" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["gbla-rec", "trian"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2


def test_options_override_single_fields_of_a_recipe() -> None:
    config = parse_run_config("train", "", ["--recipe", "movielens_small", "--model.encoder.pattern", "SG", "--seed", "3"])
    assert config.model.encoder.pattern == "SG"
    assert config.seed == 3
    assert config.stream == recipe("movielens_small").stream


def test_an_error_is_one_line_unless_asked(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> None:
        raise ValueError("count must be positive, got 0")

    with pytest.raises(SystemExit):
        command_line.run(fail, [])
    assert capsys.readouterr().err == "error: count must be positive, got 0\n"
    monkeypatch.setenv(command_line.TRACEBACK, "1")
    with pytest.raises(ValueError, match="count must be positive"):
        command_line.run(fail, [])


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_complete_and_documented(name: str) -> None:
    assert recipe(name).name == name
    text = " ".join((RECIPES[name].__doc__ or "").split())
    wanted = {
        "figures": r"Expect\b",
        "time": r"\d (s|minutes)\b",
        "hardware": r"H[12]00|CPU cores",
        "command": rf"Commands?: .*--recipe {name}\b",
    }
    missing = [what for what, pattern in wanted.items() if not re.search(pattern, text)]
    assert not missing, f"the docstring of {name} lacks {missing}"


def test_the_recipe_must_be_named() -> None:
    with pytest.raises(ValueError, match=r"--recipe must be given, one of amazon_beauty, .*own_data"):
        parse_run_config("tokenize", "", ["--dataset", "mydata"])


@pytest.mark.parametrize("name", ["..", "", "a/b", "a*", ".hidden"])
def test_names_that_are_no_directory_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"RunConfig.name must consist of letters"):
        dataclasses.replace(recipe("movielens_small"), name=name)


def test_ctrl_c_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(arguments: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        command_line.run(interrupt, [])
    assert stopped.value.code == 130
    assert "--resume goes on" in capsys.readouterr().err


def test_unknown_recipe_is_refused_with_the_list() -> None:
    with pytest.raises(ValueError, match=r"recipe must be one of \[.*'movielens_small', 'own_data'\], got 'movielens'"):
        recipe("movielens")


def test_shipped_logs_are_in_the_repository() -> None:
    for make in DATASETS.values():
        assert make().events.exists()


def test_entry_points_are_short() -> None:
    for path in (ROOT / "apps" / "gbla_apps").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 120, path
