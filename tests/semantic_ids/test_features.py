"""Item features: one row of length 1 per item in item order, also after items joined, and nothing else is accepted."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_rec.config import SemanticIdConfig
from gbla_rec.semantic_ids.features import FEATURES_FILE, load_item_features
from gbla_rec.semantic_ids.table import SemanticIdTable
from gbla_rec.semantic_ids.tokenize import append_items, tokenize

MakeDataset = Callable[..., Any]


def config(**changes: Any) -> SemanticIdConfig:
    small = {"embedding_dim": 4, "num_levels": 2, "codebook_width": 4, "dedup_width": 3, "kmeans_iterations": 4}
    return SemanticIdConfig(**{**small, **changes})


def test_rows_follow_the_items_and_have_length_1(make_dataset: MakeDataset, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((7, 5)) * np.arange(7)[:, None]
    np.save(tmp_path / "vectors.npy", vectors)
    tokenize(make_dataset(list(range(7))), config(embedding="file", embedding_file=tmp_path / "vectors.npy"), tmp_path / "ids")
    features = load_item_features(tmp_path / "ids", 7)
    assert features.dtype == np.float32 and features.shape == (7, 5)
    assert not features[0].any()
    np.testing.assert_allclose(features[1:], vectors[1:] / np.linalg.norm(vectors[1:], axis=1, keepdims=True), rtol=1e-6)


def test_a_new_item_has_a_row_and_old_items_keep_theirs(make_dataset: MakeDataset, tmp_path: Path) -> None:
    titles = ["red nail polish", "blue nail polish", None, "electric shaver", "shaver head", "electric shaver head"]
    tokenize(make_dataset([10, 20, 30, 40, 50, 60], {"title": titles}), config(), tmp_path / "old")
    # id 5 comes first in the new dataset and is worded like id 40
    append_items(
        tmp_path / "old",
        make_dataset([5, 10, 20, 30, 40, 50, 60], {"title": ["electric shaver", *titles]}),
        tmp_path / "new",
    )
    old, new = load_item_features(tmp_path / "old", 6), load_item_features(tmp_path / "new", 7)
    np.testing.assert_allclose(new[1:], old, atol=1e-6)
    np.testing.assert_allclose(new[0], old[3], atol=1e-6)
    assert not new[3].any()
    np.testing.assert_allclose(np.linalg.norm(new[[0, 1, 2, 4, 5, 6]], axis=1), 1, rtol=1e-5)


def test_a_new_item_without_events_has_the_features_of_its_text_alone(make_dataset: MakeDataset, tmp_path: Path) -> None:
    titles, histories = ["red nail", "blue nail", "electric shaver", "shaver head"], [[0, 1, 2, 3], [1, 0, 3], [2, 3]]
    both = config(embedding="text_and_behaviour", behaviour_weight=2.0)
    tokenize(make_dataset([10, 20, 30, 40], {"title": titles}, histories), both, tmp_path / "old")
    append_items(tmp_path / "old", make_dataset([10, 20, 30, 40, 50], {"title": [*titles, "red nail"]}, histories), tmp_path / "new")
    features = load_item_features(tmp_path / "new", 5)
    width = features.shape[1] - 4
    assert not features[4, width:].any()
    # the text part of an item worded alike, which shares its length 1 with a behaviour part of twice that length
    np.testing.assert_allclose(features[0, :width] * 5**0.5, features[4, :width], atol=1e-6)


def test_missing_or_wrong_features_are_refused_with_the_cure(make_dataset: MakeDataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no semantic IDs there.*gbla-rec tokenize"):
        load_item_features(tmp_path / "nowhere", 3)
    directory = tmp_path / "ids"
    tokenize(make_dataset([1, 2, 3], {"title": ["a", "b", "a b"]}), config(), directory)
    with pytest.raises(ValueError, match=r"shape \(4, F\).*got float32 of shape \(3, \d\).*gbla-rec tokenize"):
        load_item_features(directory, 4)
    np.save(directory / FEATURES_FILE, np.full((3, 2), np.nan, dtype=np.float32))
    with pytest.raises(ValueError, match="must be finite, 3 rows are not"):
        load_item_features(directory, 3)
    with pytest.raises(ValueError, match=f"{FEATURES_FILE} was changed"):
        SemanticIdTable.load(directory)
    (directory / FEATURES_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"come without item features.*gbla-rec tokenize"):
        load_item_features(directory, 3)
