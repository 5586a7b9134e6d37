"""``gbla-rec prepare --dataset``: published files become a dataset of the workspace, and every setting can be replaced."""

from pathlib import Path

import polars as pl
import pytest

from gbla_apps.prepare import main
from gbla_rec.data.schema import read_manifest


@pytest.fixture
def beauty(tmp_path: Path) -> Path:
    """An Amazon category of three users, in the Parquet form."""
    directory = tmp_path / "beauty"
    directory.mkdir()
    pl.DataFrame({"user_id": [1, 2, 3], "items": [[4, 5, 6, 7, 4], [5, 4, 6], [7]]}).write_parquet(directory / "sequences.parquet")
    pl.DataFrame({"item_id": [4, 5, 6, 7], "title": ["a", "b", "c", None]}).write_parquet(directory / "items.parquet")
    return directory


def test_a_category_is_prepared_by_its_path_alone(beauty: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--dataset", "amazon", "--path", str(beauty)])
    said = capsys.readouterr().out
    assert f"{workspace / 'datasets' / 'amazon_beauty'}: 3 users, 4 items, 9 events" in said
    assert "2 for validation, 2 for test" in said and "text columns: title" in said


def test_any_setting_can_be_replaced(beauty: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (beauty / "items.parquet").unlink()
    arguments = ["--dataset", "amazon", "--path", str(beauty), "--name", "mine"]
    main([*arguments, "--split.num-targets", "2", "--max-events-per-shard", "5"])
    manifest = read_manifest(workspace / "datasets" / "mine")
    assert (manifest.split.num_targets, manifest.split.ties, len(manifest.shards), manifest.num_test_users) == (2, "ordered", 2, 1)
    assert "text columns: none" in capsys.readouterr().out


def test_files_that_must_be_converted_are(tmp_path: Path, workspace: Path) -> None:
    (tmp_path / "Toys.txt").write_text("1 4 5 6\n2 4\n")
    main(["--dataset", "amazon", "--path", str(tmp_path / "Toys.txt")])
    assert read_manifest(workspace / "datasets" / "amazon_toys").num_events == 4


@pytest.mark.parametrize("arguments", [["--dataset", "amazon"], ["--path", "here"], ["--recipe", "movielens_small", "--path", "here"]])
def test_a_dataset_needs_a_path_and_a_path_a_dataset(arguments: list[str]) -> None:
    with pytest.raises(ValueError, match="--dataset and --path must be given together"):
        main(arguments)


def test_help_shows_what_the_path_sets(beauty: Path, workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--dataset", "amazon", "--path", str(beauty), "--help"])
    said = capsys.readouterr().out
    assert "amazon, movielens, yambda" in " ".join(said.replace("│", " ").split()) and "amazon_beauty" in said
    assert not workspace.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "amazon_beauty"], r"--recipe must be one of movielens_small, got 'amazon_beauty'; .*--dataset amazon\|.* --path DIR"),
        (["--dataset", "shop"], r"--dataset must be one of amazon, .*got 'shop'; a log of your own: --name NAME --events FILE"),
    ],
)
def test_a_source_that_is_not_known_is_refused_with_the_way_to_ones_own(arguments: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(arguments)
