"""The metric values of every user of an evaluation, kept as Parquet, so that runs can be compared without a model."""

# U users, S runs of a group, one for each seed (docs/shapes.md has another S)

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from polars.exceptions import PolarsError

from gbla_rec.checkpoint.run_directory import PER_USER, TEMPORARY_PREFIX, file_digest
from gbla_rec.evaluation.summaries import UserValues

History = Literal["kept", "removed"]
"""Whether items of a user's own history can be ranked, or are removed exactly: left out of the search, not filtered after it."""
USER_COLUMNS = ("user_row", "history_length", "rarest_target_events", "history_slice", "cold_slice")


def write_per_user(run_dir: Path, users: pl.DataFrame, columns: Mapping[History, UserValues]) -> dict[str, str]:
    """Write ``per_user.parquet``: one row a user, ``USER_COLUMNS``, then ``<history>/<method>/<metric>``.

    Args:
        run_dir: the run's directory.
        users: ``USER_COLUMNS``, ``U`` rows.
        columns: the values of each treatment of the history.

    Returns:
        ``file`` and ``sha256``, by which ``read_per_user`` knows that the file belongs to the results.
    """
    values = {
        f"{history}/{method}/{metric}": per_user
        for history, methods in columns.items()
        for method, metrics in methods.items()
        for metric, per_user in metrics.items()
    }
    path = run_dir / PER_USER
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    users.select(USER_COLUMNS).with_columns(**{name: pl.Series(column) for name, column in values.items()}).write_parquet(temporary)
    digest = file_digest(temporary)
    temporary.rename(path)
    return {"file": PER_USER, "sha256": digest}


def read_per_user(run_dir: Path, results: Mapping[str, Any]) -> pl.DataFrame:
    """The file of ``write_per_user``.

    Args:
        run_dir: the run's directory.
        results: its ``results.json``.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, or belongs to another evaluation than ``results``.
    """
    path = run_dir / PER_USER
    if not path.is_file():
        raise FileNotFoundError(
            f"{run_dir} has no values of single users ({PER_USER}); evaluate it again: gbla-rec evaluate --run-dir {run_dir}"
        )
    if file_digest(path) != results["per_user"]["sha256"]:
        raise ValueError(f"{path} does not belong to the results.json beside it; evaluate again: gbla-rec evaluate --run-dir {run_dir}")
    try:
        return pl.read_parquet(path, glob=False, hive_partitioning=False)
    except PolarsError as error:
        raise ValueError(f"{path} cannot be read ({error}); evaluate the run again") from error


def values_of(frame: pl.DataFrame, history: History, method: str) -> dict[str, NDArray[np.float64]]:
    """Metric -> ``(U,)`` values of one method; empty if the file has none."""
    prefix = f"{history}/{method}/"
    return {name.removeprefix(prefix): frame[name].to_numpy() for name in frame.columns if name.startswith(prefix)}


def values_by_seed(runs: Sequence[Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
    """Metric -> ``(U, S)``: ``values_of`` each of ``S`` runs side by side, for the metrics that all of them have."""
    return {metric: np.stack([run[metric] for run in runs], axis=1) for metric in runs[0] if all(metric in run for run in runs)}
