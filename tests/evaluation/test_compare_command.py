"""``gbla-rec compare``: what is asked of the same runs a second time replaces no first answer, and runs of one name are told apart."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_apps.compare import main


def test_comparisons_of_other_scores_and_histories_lie_apart(
    evaluated_runs: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a", "b"):
        evaluated_runs.write(name, 0, np.linspace(0, 1, 40), both_histories=True)
    for options in ([], ["--history", "removed"], ["--score", "item-kNN"], ["--b-score", "item-kNN"]):
        main(["a", "b", "--samples", "20", *options])
    names = ["a.item-kNN_vs_b.item-kNN", "a_vs_b", "a_vs_b.item-kNN", "a_vs_b_removed"]
    assert sorted(path.name for path in (workspace / "comparisons").iterdir()) == names
    assert all((workspace / "comparisons" / name / "comparison.json").is_file() for name in names)


def test_the_files_are_there_where_the_reader_of_the_output_is_gone(
    evaluated_runs: Any, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise BrokenPipeError

    for name in ("a", "b"):
        evaluated_runs.write(name, 0, np.linspace(0, 1, 40))
    monkeypatch.setattr("gbla_apps.compare.Console.print", refuse)
    with pytest.raises(BrokenPipeError):
        main(["a", "b", "--samples", "20"])
    assert {path.name for path in (workspace / "comparisons" / "a_vs_b").iterdir()} == {"comparison.json", "comparison.md"}


def test_runs_of_one_name_have_headings_and_files_of_their_own(evaluated_runs: Any, workspace: Path, tmp_path: Path) -> None:
    older, newer = (evaluated_runs.write("shop", 0, np.linspace(0, 1, 40) * scale, started=f"day{scale}") for scale in (1, 2))
    copy = Path(shutil.copytree(older, tmp_path / "elsewhere" / older.name))
    for pair in ((older, newer), (newer, older), (older, copy), (older, older)):
        main([*map(str, pair), "--samples", "20"])
    found = {path.name: path.joinpath("comparison.md").read_text() for path in (workspace / "comparisons").iterdir()}
    names = ["shop-day1-0_vs_shop-day2-0", "shop-day2-0_vs_shop-day1-0", "shop-shop-day1-0_vs_shop-elsewhere-day1-0", "shop_vs_shop"]
    assert sorted(found) == names
    text = found["shop-day1-0_vs_shop-day2-0"]
    assert "## shop day1-0 (generative) minus shop day2-0 (generative): " in text
    assert "| metric | shop day1-0 | shop day2-0 | difference |" in text


def test_what_the_groups_differ_in_is_said_in_the_terminal_and_in_both_files(
    evaluated_runs: Any, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        evaluated_runs.write("a", seed, np.linspace(0, 1, 40))
        evaluated_runs.write("b", seed, np.linspace(0, 1, 40), pattern="SSS")
        evaluated_runs.write("c", seed + 2, np.linspace(0, 1, 40))
    cases = [
        (["a", "b"], "the groups differ in: model.encoder.pattern (SGG, SSS)"),
        (["b", "a"], "the groups differ in: model.encoder.pattern (SSS, SGG)"),
        (["a", "c"], "the groups differ in no setting, only in their runs, of seeds 0, 1 and of 2, 3"),
        (["a", "a"], "both groups are the same runs with the same score, so every difference is 0"),
        (
            ["a", "a", "--a-score", "generative", "--b-score", "item-kNN"],
            "both groups are the same runs, the scores differ: generative, item-kNN",
        ),
    ]
    for place, (arguments, line) in enumerate(cases):
        main([*arguments, "--samples", "20", "--output", str(workspace / str(place))])
        assert line in capsys.readouterr().out.splitlines()
        assert line in (workspace / str(place) / "comparison.md").read_text().splitlines()
        (found,) = json.loads((workspace / str(place) / "comparison.json").read_text())
        assert found["same_runs"] == ("same runs" in line)
        assert list(found["differ_in"]) == (["model.encoder.pattern"] if "b" in arguments else [])


def test_groups_of_many_runs_get_names_that_a_file_system_takes(evaluated_runs: Any, workspace: Path) -> None:
    first, second = (
        [str(evaluated_runs.write(64 * "a", seed, np.linspace(0, 1, 40), started=f"20261127T0258{group}")) for seed in range(6)]
        for group in (1, 2)
    )
    for groups in ((first, second), (second, first)):
        main(["--a", *groups[0], "--b", *groups[1], "--samples", "20"])
    main([*first, *second, "--samples", "20"])
    names = [path.name for path in (workspace / "comparisons").iterdir()]
    assert len(names) == 3 and max(map(len, names)) <= 200


@pytest.mark.parametrize("command", ["report", "compare"])
def test_an_output_that_cannot_be_written_is_named_with_the_cure(evaluated_runs: Any, tmp_path: Path, command: str) -> None:
    run_dir = str(evaluated_runs.write("a", 0, np.linspace(0, 1, 40)))
    arguments = ["--runs", run_dir] if command == "report" else [run_dir, run_dir, "--samples", "20"]
    (tmp_path / "file").touch()
    (tmp_path / "taken" / ("report.md" if command == "report" else "comparison.md")).mkdir(parents=True)
    for output, reason in (("file", "File exists"), ("file/below", "Not a directory"), ("taken", r"Is a directory at .*/taken/\w+\.md")):
        said = rf"{tmp_path / output} could not be written: {reason}.*; give --output a directory that can be written"
        with pytest.raises(OSError, match=said):
            importlib.import_module(f"gbla_apps.{command}").main([*arguments, "--output", str(tmp_path / output)])
