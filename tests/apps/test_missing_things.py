"""What a command says when a name of the workspace is wrong: the cure, and the names that there are."""

import argparse
from pathlib import Path

import pytest

from gbla_apps import command_line, tokenize
from gbla_rec.checkpoint.run_directory import read_config
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.table import SemanticIdTable
from gbla_rec.workspace import latest_run_dir


def test_a_missing_dataset_is_refused_with_the_names_of_the_others(workspace: Path) -> None:
    directory = workspace / "datasets"
    with pytest.raises(FileNotFoundError, match=r"prepare --name shop .*: none$"):
        PreparedDataset.open(directory / "shop")
    for name in ("kiosk", "bazaar"):
        (directory / name).mkdir(parents=True)
        (directory / name / "dataset.json").touch()
    (directory / "half").mkdir()
    with pytest.raises(FileNotFoundError, match=r"prepare --name shop .*: bazaar, kiosk$"):
        PreparedDataset.open(directory / "shop")


def test_a_missing_run_is_refused_with_the_names_of_the_others(workspace: Path) -> None:
    for run in ("kiosk/1", "kiosk/2", "bazaar/1"):
        (workspace / "runs" / run).mkdir(parents=True)
        (workspace / "runs" / run / "config.json").touch()
    with pytest.raises(FileNotFoundError, match=r"no run called 'shop' in .* called: bazaar, kiosk;"):
        latest_run_dir("shop")


def test_runs_that_saved_nothing_are_refused_as_such(workspace: Path) -> None:
    for run in ("shop/1", "shop/2"):
        (workspace / "runs" / run).mkdir(parents=True)
        (workspace / "runs" / run / "config.json").touch()
    for name in ("shop", None):
        with pytest.raises(FileNotFoundError, match=r"has a checkpoint yet, the newest is .*shop/2; let it train for longer"):
            latest_run_dir(name, with_checkpoint=True)


def test_the_directory_of_a_name_is_refused_with_its_newest_run(workspace: Path) -> None:
    for run in ("shop/1", "shop/2"):
        (workspace / "runs" / run).mkdir(parents=True)
        (workspace / "runs" / run / "config.json").touch()
    parser = argparse.ArgumentParser()
    command_line.add_run_options(parser)
    with pytest.raises(ValueError, match=r"with 2, the newest .*shop/2; or give --name shop"):
        command_line.chosen_run(parser.parse_args(["--run-dir", str(workspace / "runs" / "shop")]))
    one = workspace / "runs" / "shop" / "1"
    assert command_line.chosen_run(parser.parse_args(["--run-dir", str(one)])) == one


def test_a_config_without_a_needed_field_is_refused_by_name(workspace: Path) -> None:
    workspace.mkdir(parents=True, exist_ok=True)
    for text, what in (('{"name": "shop"}', r"\['name', 'dataset'\], got \['name'\]"), ("[]", "be an object")):
        (workspace / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"config.json cannot be read: RunConfig must .*{what}"):
            read_config(workspace)


@pytest.mark.usefixtures("tiny_workspace")
def test_semantic_ids_that_are_there_are_kept_and_both_cures_named(workspace: Path) -> None:
    ids = workspace / "semantic_ids" / "tiny"
    before = {path: path.read_bytes() for path in ids.iterdir()}
    with pytest.raises(FileExistsError) as refused:
        tokenize.main(["--recipe", "own_data", "--dataset", "tiny"])
    said = str(refused.value)
    assert said.startswith(f"{ids} exists, and a dataset has one set of semantic IDs; delete it to make them anew")
    assert "runs that were trained on them refuse others" in said and said.endswith("or prepare the log under another name too")
    assert {path: path.read_bytes() for path in ids.iterdir()} == before


def test_missing_semantic_ids_are_refused_with_the_dataset_to_tokenize(workspace: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gbla-rec tokenize --dataset shop,.*--semantic-ids options"):
        SemanticIdTable.load(workspace / "semantic_ids" / "shop")
