"""A table survives the disk bit for bit, and anything but the whole, unchanged table of this dataset is refused."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from gbla_rec.semantic_ids.table import SemanticIdTable

CODES = torch.tensor([[0, 3, 0], [2, 1, 0], [2, 1, 1]])
WIDTHS = (4, 4, 2)


@pytest.mark.parametrize("item_ids", [None, pl.Series([5, 70, 900]), pl.Series(["a", "b|c", "ü"])])
def test_saving_and_loading_changes_nothing(tmp_path: Path, item_ids: pl.Series | None) -> None:
    table = SemanticIdTable(CODES, WIDTHS, item_ids)
    table.save(tmp_path / "ids", dataset_hash="abc")
    loaded = SemanticIdTable.load(tmp_path / "ids", num_items=3, dataset_hash="abc")
    assert torch.equal(loaded.codes, CODES) and loaded.codes.dtype == torch.int64
    assert loaded.widths == WIDTHS
    assert loaded.item_ids is not None and loaded.item_ids.to_list() == ([0, 1, 2] if item_ids is None else item_ids.to_list())
    assert loaded.content_hash == table.content_hash
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_the_content_hash_sees_codes_widths_and_ids() -> None:
    tables = [
        SemanticIdTable(CODES, WIDTHS),
        SemanticIdTable(CODES.flip(0), WIDTHS),
        SemanticIdTable(CODES, (4, 4, 3)),
        SemanticIdTable(CODES, WIDTHS, pl.Series(["1", "23", "4"])),
        SemanticIdTable(CODES, WIDTHS, pl.Series(["12", "3", "4"])),
    ]
    assert len({table.content_hash for table in tables}) == len(tables)
    assert tables[0].content_hash == SemanticIdTable(CODES.clone(), WIDTHS, pl.Series([0, 1, 2])).content_hash


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    SemanticIdTable(CODES, WIDTHS).save(tmp_path / "ids")
    before = {path.name: path.read_bytes() for path in (tmp_path / "ids").iterdir()}
    with pytest.raises(FileExistsError, match="delete it or choose another name"):
        SemanticIdTable(CODES.flip(0), WIDTHS).save(tmp_path / "ids")
    assert {path.name: path.read_bytes() for path in (tmp_path / "ids").iterdir()} == before


def test_a_changed_or_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    SemanticIdTable(CODES, WIDTHS).save(tmp_path / "ids")
    path = tmp_path / "ids" / "table.parquet"
    SemanticIdTable(CODES.flip(0), WIDTHS).to_frame().write_parquet(path)
    with pytest.raises(ValueError, match=r"table.parquet was changed after it was written.*gbla-rec tokenize"):
        SemanticIdTable.load(tmp_path / "ids")
    path.unlink()
    with pytest.raises(ValueError, match=r"table.parquet is missing"):
        SemanticIdTable.load(tmp_path / "ids")


def test_a_table_of_another_dataset_is_refused_with_a_cure(tmp_path: Path) -> None:
    SemanticIdTable(CODES, WIDTHS).save(tmp_path / "ids", dataset_hash="abc")
    with pytest.raises(ValueError, match=r"cover 3 items but the dataset has 4.*append_items"):
        SemanticIdTable.load(tmp_path / "ids", num_items=4)
    with pytest.raises(ValueError, match=r"content hash abc, this one has xyz"):
        SemanticIdTable.load(tmp_path / "ids", dataset_hash="xyz")


def test_no_table_and_a_newer_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="make them with: gbla-rec tokenize"):
        SemanticIdTable.load(tmp_path)
    SemanticIdTable(CODES, WIDTHS).save(tmp_path / "ids")
    path = tmp_path / "ids" / "semantic_ids.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(ValueError, match="schema_version must be 1, got 99"):
        SemanticIdTable.load(tmp_path / "ids")
    path.write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        SemanticIdTable.load(tmp_path / "ids")


def test_ids_that_do_not_match_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="each of the 3 rows of codes, got 2 ids"):
        SemanticIdTable(CODES, WIDTHS, pl.Series([1, 2]))
