"""MovieLens ml-latest-small as Parquet: 610 users, 9,742 films, 100,836 ratings (GroupLens, non-commercial use)."""

from pathlib import Path

from gbla_rec.config import PrepareConfig, SplitConfig


def movielens_small_config(directory: Path) -> PrepareConfig:
    """How to prepare MovieLens from ``interactions.parquet`` and ``items.parquet`` in ``directory``.

    The last ten ratings of a user are the test targets, the ten before them the validation targets. 23 % of the events
    share their second with another of the same user, so a cut moves back to the start of its second and may have more.
    """
    return PrepareConfig(
        name="movielens_small",
        events=directory / "interactions.parquet",
        items=directory / "items.parquet",
        context_columns=("rating",),
        text_columns=("title", "genres"),
        split=SplitConfig(kind="leave_last", num_targets=10),
    )
