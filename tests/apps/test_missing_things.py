"""What a command says when a name of the workspace is wrong: the cure, and the names that there are."""

from pathlib import Path

import pytest

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


def test_missing_semantic_ids_are_refused_with_the_dataset_to_tokenize(workspace: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gbla-rec tokenize --dataset shop,.*--semantic-ids options"):
        SemanticIdTable.load(workspace / "semantic_ids" / "shop")
