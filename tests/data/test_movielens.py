"""The MovieLens sample that ships with the repository prepares to what its publisher says it holds."""

from pathlib import Path

import numpy as np
import pytest

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.movielens import movielens_small_config
from gbla_rec.data.prepare import prepare

DIRECTORY = Path(__file__).parents[2] / "examples" / "data" / "ml-latest-small"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    return prepare(movielens_small_config(DIRECTORY), tmp_path_factory.mktemp("movielens") / "out")


def test_counts_are_the_published_ones(dataset: PreparedDataset) -> None:
    manifest = dataset.manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == (610, 9_742, 100_836)
    assert dataset.context_values("rating").to_list() == [half / 2 for half in range(1, 11)]
    assert manifest.text_columns == ("title", "genres")
    assert dataset.items().row(0)[3:] == ("Toy Story (1995)", "Adventure|Animation|Children|Comedy|Fantasy")


def test_content_is_pinned(dataset: PreparedDataset) -> None:
    dataset.verify()
    assert dataset.manifest.content_hash == "a68df8525009c114c0fd5729590ebd6c80aed5893972490ff60503ee1526fc14"
    assert (dataset.manifest.num_validation_users, dataset.manifest.num_test_users) == (581, 584)


def test_no_evaluated_user_has_fewer_than_ten_test_targets(dataset: PreparedDataset) -> None:
    _, test_begin, num_events = dataset.read_lengths(0)
    num_targets = num_events - test_begin
    assert np.all((num_targets == 0) | (num_targets >= 10))


def test_the_terms_of_the_data_ship_with_it() -> None:
    assert "GroupLens" in (DIRECTORY / "README.txt").read_text()
    assert "non-commercial" in (DIRECTORY / "TERMS.md").read_text()
