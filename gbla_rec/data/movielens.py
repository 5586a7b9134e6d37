"""MovieLens in its published forms (Harper and Konstan, TiiS 2015; GroupLens, non-commercial use)."""

import re
from collections.abc import Callable
from pathlib import Path

from gbla_rec.config import PrepareConfig, SplitConfig
from gbla_rec.data.movielens_dat import convert_dat
from gbla_rec.data.published import PublishedDataset, dataset_name, files_like, the_only_file

SPLIT = SplitConfig(kind="leave_last", num_targets=10)
"""The last ten ratings of a user are the test targets, the ten before them the validation targets.

In ml-latest-small 23 % of the events share their second with another of the same user, so a cut moves back to the start of
its second and may have more."""


def movielens_small_config(directory: Path) -> PrepareConfig:
    """How to prepare MovieLens from ``interactions.parquet`` and ``items.parquet`` in ``directory``."""
    return PrepareConfig(
        name="movielens_small",
        events=directory / "interactions.parquet",
        items=directory / "items.parquet",
        context_columns=("rating",),
        text_columns=("title", "genres"),
        split=SPLIT,
    )


def movielens_dataset(path: Path) -> PublishedDataset:
    """How to prepare the MovieLens set at ``path``, by the files that lie there.

    * ``ratings.csv`` and ``movies.csv`` (ml-latest-small, ml-latest, ml-20m, ml-25m, ml-32m);
    * ``ratings.dat`` and ``movies.dat`` (ml-1m, ml-10m);
    * ``interactions.parquet`` and ``items.parquet`` (user_id, item_id, rating, timestamp; item_id, title, genres).

    Without the table of films there are no titles. Ratings are a context column, and films without ratings are part of the catalogue.

    Args:
        path: the directory, or the file of ratings where several forms lie together.

    Raises:
        FileNotFoundError: if ``path`` does not exist.
        ValueError: if no form, or more than one, is recognised.
    """
    forms: dict[str, Callable[[Path], PublishedDataset]] = {
        "ratings.csv": _csv_form,
        "ratings.dat": _dat_form,
        "interactions.parquet": _parquet_form,
    }
    file = the_only_file(path, files_like(path, re.compile("|".join(map(re.escape, forms)))), forms)
    return forms[file.name](file)


def _csv_form(ratings: Path) -> PublishedDataset:
    return PublishedDataset(form="CSV", config=_config(ratings, "movies.csv", "userId", "movieId"))


def _dat_form(ratings: Path) -> PublishedDataset:
    return PublishedDataset(form="'::' text", config=_config(ratings, "movies.dat", "userId", "movieId"), convert=convert_dat)


def _parquet_form(ratings: Path) -> PublishedDataset:
    return PublishedDataset(form="Parquet", config=_config(ratings, "items.parquet", "user_id", "item_id"))


def _config(ratings: Path, films_name: str, user_column: str, item_column: str) -> PrepareConfig:
    films = ratings.with_name(films_name)
    return PrepareConfig(
        name=dataset_name("movielens", ratings.resolve().parent.name.lower().removeprefix("ml-")),
        events=ratings,
        items=films if films.is_file() else None,
        user_column=user_column,
        item_column=item_column,
        context_columns=("rating",),
        text_columns=("title", "genres") if films.is_file() else (),
        split=SPLIT,
    )
