"""Vectors from a file: exactly one finite vector per item, or the rows at fault are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gbla_rec.semantic_ids.file_embeddings import FileEmbedder

MakeDataset = Callable[..., Any]
IDS = [3, 5, 8]
VECTORS = [[1.0, 2.0], [3.0, 4.0], [0.0, 0.0]]


def embed(make_dataset: MakeDataset, file: Path, ids: list[Any] = IDS) -> Any:
    return FileEmbedder(file).embed(make_dataset(ids))


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, content)
    else:
        pl.DataFrame(content).write_parquet(path)
    return path


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int64])
def test_npy_rows_are_items_in_order(make_dataset: MakeDataset, tmp_path: Path, dtype: Any) -> None:
    assert embed(make_dataset, write(tmp_path / "e.npy", np.array(VECTORS, dtype=dtype))).tolist() == VECTORS


@pytest.mark.parametrize("dtype", [pl.List(pl.Float64), pl.List(pl.Float32), pl.List(pl.Int64), pl.Array(pl.Float32, 2)])
def test_parquet_rows_are_matched_by_id_whatever_their_order(make_dataset: MakeDataset, tmp_path: Path, dtype: Any) -> None:
    column = pl.Series("v", [VECTORS[2], [9, 9], VECTORS[0], VECTORS[1]]).cast(dtype)
    file = write(tmp_path / "e.parquet", {"item_id": [8, 4, 3, 5], "v": column, "title": ["", "", "", ""]})
    assert embed(make_dataset, file).tolist() == VECTORS


def test_string_ids_are_matched(make_dataset: MakeDataset, tmp_path: Path) -> None:
    file = write(tmp_path / "e.parquet", {"item_id": ["b", "a"], "v": [[1.0], [2.0]]})
    assert embed(make_dataset, file, ["a", "b"]).tolist() == [[2.0], [1.0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("e.npy", np.zeros((2, 4)), r"shape \(3, F\) and numbers.*got shape \(2, 4\)"),
        ("e.npy", np.zeros(3), r"got shape \(3,\)"),
        ("e.npy", np.zeros((3, 0)), r"got shape \(3, 0\)"),
        ("e.npy", np.array([["a"], ["b"], ["c"]]), r"numbers"),
        ("e.npy", np.array([[None], [None], [None]]), "not a readable .npy"),
        ("e.npy", np.array([[1.0], [np.nan], [np.inf]]), r"2 are not .*row 1 \(item_id 5\), row 2 \(item_id 8\)"),
        ("e.npy", np.array([[1.0], [1e39], [0.0]]), r"finite in fp32, 1 are not .*row 1 \(item_id 5\)"),
        ("e.parquet", {"item_id": [3, 5], "v": [[1.0], [1.0]]}, r"1 have none: item_id \[8\]"),
        ("e.parquet", {"item_id": [3, 5, 8], "v": [[1.0], None, [1.0]]}, r"1 have none: item_id \[5\]"),
        ("e.parquet", {"item_id": [3, 5, 8, 5], "v": [[1.0]] * 4}, r"1 occur more than once: \[5\]"),
        ("e.parquet", {"item_id": [3, 5, 8], "v": [[1.0], [1.0, 2.0], []]}, r"\(1 in the first\), not so item_id \[5, 8\]"),
        ("e.parquet", {"item_id": [3, 5, 8], "v": [[1.0], [None], [1.0]]}, r"row 1 \(item_id 5\)"),
        ("e.parquet", {"item_id": [3, 5, 8], "v": [["a"]] * 3}, "must hold numbers"),
        ("e.parquet", {"item_id": ["3", "5", "8"], "v": [[1.0]] * 3}, "item_id must be Int64 as in the dataset, got String"),
        ("e.parquet", {"item": [3, 5, 8], "v": [[1.0]] * 3}, "needs a column item_id"),
        ("e.parquet", {"item_id": [3, 5, 8], "v": [[1.0]] * 3, "w": [[1.0]] * 3}, "exactly one column of lists"),
    ],
)
def test_a_faulty_file_is_refused_by_name(make_dataset: MakeDataset, tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        embed(make_dataset, file)


def test_no_file_an_unreadable_one_and_another_kind_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"embedding_file: no such file"):
        embed(make_dataset, tmp_path / "no.npy")
    messages = {"e.csv": "must end in .npy or .parquet", "e.npy": "not a readable .npy", "e.parquet": "not a readable Parquet"}
    for name, message in messages.items():
        (tmp_path / name).write_text("item_id,v\n")
        with pytest.raises(ValueError, match=message):
            embed(make_dataset, tmp_path / name)
