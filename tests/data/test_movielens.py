"""MovieLens prepares to what its publisher says it holds, in each of its published forms."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.movielens import movielens_dataset, movielens_small_config
from gbla_rec.data.prepare import prepare

DIRECTORY = Path(__file__).parents[2] / "examples" / "data" / "ml-latest-small"
SMALL_HASH = "a68df8525009c114c0fd5729590ebd6c80aed5893972490ff60503ee1526fc14"
RATINGS = "1::7::4.5::100\n1::9223372036854775807::0.5::100\n2::7::5::90\n"
FILMS = '7::Amélie :: the film, "quoted" (2001)::Comedy|Romance\n8::Never rated (1999)::Drama\n'


def prepare_path(path: Path) -> PreparedDataset:
    found = movielens_dataset(path)
    return prepare(found.config, path.parent / "out", found.convert)


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
    assert dataset.manifest.content_hash == SMALL_HASH
    assert (dataset.manifest.num_validation_users, dataset.manifest.num_test_users) == (581, 584)


def test_no_evaluated_user_has_fewer_than_ten_test_targets(dataset: PreparedDataset) -> None:
    _, test_begin, num_events = dataset.read_lengths(0)
    num_targets = num_events - test_begin
    assert np.all((num_targets == 0) | (num_targets >= 10))


def test_the_terms_of_the_data_ship_with_it() -> None:
    assert "GroupLens" in (DIRECTORY / "README.txt").read_text()
    assert "non-commercial" in (DIRECTORY / "TERMS.md").read_text()


@pytest.mark.parametrize("form", ["parquet", "csv", "dat"])
def test_every_form_of_the_same_ratings_is_the_same_dataset(tmp_path: Path, form: str) -> None:
    ratings, films = (pl.read_parquet(DIRECTORY / f"{name}.parquet") for name in ("interactions", "items"))
    directory = tmp_path / "ml-latest-small"
    directory.mkdir()
    if form == "parquet":
        directory = DIRECTORY
    elif form == "csv":
        ratings.rename({"user_id": "userId", "item_id": "movieId"}).write_csv(directory / "ratings.csv")
        films.rename({"item_id": "movieId"}).write_csv(directory / "movies.csv")
        (directory / "tags.csv").write_text("userId,movieId,tag,timestamp\n")
    else:
        for frame, name in ((ratings, "ratings.dat"), (films, "movies.dat")):
            lines = ("::".join(map(str, row)) for row in frame.rows())
            (directory / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = movielens_dataset(directory)
    dataset = prepare(found.config, tmp_path / "out", found.convert)
    assert (dataset.manifest.content_hash, dataset.manifest.name) == (SMALL_HASH, "movielens_latest-small")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_titles_keep_their_accents_and_separators(tmp_path: Path, encoding: str) -> None:
    directory = tmp_path / "ml-1m"
    directory.mkdir()
    (directory / "ratings.dat").write_text(RATINGS)
    (directory / "movies.dat").write_text(FILMS, encoding=encoding)
    dataset = prepare_path(directory)
    assert dataset.items().select("item_id", "title", "genres").rows() == [
        (7, 'Amélie :: the film, "quoted" (2001)', "Comedy|Romance"),
        (8, "Never rated (1999)", "Drama"),
        (2**63 - 1, None, None),
    ]
    assert dataset.context_values("rating").to_list() == [0.5, 4.5, 5.0]
    assert (dataset.manifest.name, dataset.manifest.num_events) == ("movielens_1m", 3)


def test_ratings_prepare_without_the_table_of_films(tmp_path: Path) -> None:
    (tmp_path / "ml-10m").mkdir()
    (tmp_path / "ml-10m" / "ratings.dat").write_text(RATINGS)
    assert prepare_path(tmp_path / "ml-10m").manifest.text_columns == ()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("ratings.dat", RATINGS + "\n3::7::5\n", ["line 5", "userId::movieId::rating::timestamp", "3::7::5"]),
        ("ratings.dat", "1::7::::100\n", ["line 1", "'1::7::::100'"]),
        ("movies.dat", "7::No genres\n", ["line 1", "movieId::title::genres"]),
    ],
)
def test_unreadable_lines_are_named_and_leave_nothing(
    tmp_path: Path, listing: Callable[[Path], list[str]], name: str, content: str, words: list[str]
) -> None:
    directory = tmp_path / "ml-1m"
    directory.mkdir()
    (directory / "ratings.dat").write_text(RATINGS)
    (directory / name).write_text(content)
    with pytest.raises(ValueError) as caught:
        prepare_path(directory)
    for word in (name, *words):
        assert word in str(caught.value)
    assert listing(tmp_path) == ["ml-1m"]


def test_a_path_without_ratings_or_with_two_forms_is_refused(tmp_path: Path) -> None:
    (tmp_path / "movies.dat").touch()
    with pytest.raises(ValueError, match=r"none of ratings.csv, ratings.dat, interactions.parquet, but movies.dat"):
        movielens_dataset(tmp_path)
    for name in ("ratings.csv", "ratings.dat"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"more than one log: ratings.csv, ratings.dat"):
        movielens_dataset(tmp_path)
    assert movielens_dataset(tmp_path / "ratings.dat").config.items == tmp_path / "movies.dat"
