"""Prepared datasets made from frames, for the tests of the data layer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gbla_rec.config import PrepareConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare

PrepareFrame = Callable[..., PreparedDataset]


@pytest.fixture(scope="session")
def prepare_frame(tmp_path_factory: pytest.TempPathFactory) -> PrepareFrame:
    """``prepare_frame(frame, ...)`` writes a log to one or several files and prepares it."""

    def prepared(
        frame: pl.DataFrame, *, num_files: int = 1, csv: bool = False, items: pl.DataFrame | None = None, **settings: Any
    ) -> PreparedDataset:
        directory = tmp_path_factory.mktemp("prepared")
        log = directory / "log"
        log.mkdir()
        size = max(1, -(-len(frame) // num_files))
        for number, part in enumerate(frame.iter_slices(size)):
            if csv:
                part.write_csv(log / f"{number}.csv")
            else:
                part.write_parquet(log / f"{number}.parquet")
        if items is not None:
            items.write_parquet(directory / "items.parquet")
            settings["items"] = directory / "items.parquet"
        return prepare(PrepareConfig(name="test", events=log, **settings), directory / "out")

    return prepared


@pytest.fixture(scope="session")
def serial_log() -> Callable[..., pl.DataFrame]:
    """``serial_log(lengths, ...)``: a log in which every event has an item of its own, so that items identify events."""

    def make(lengths: list[int], *, events_per_second: float = 1.0, seed: int = 0) -> pl.DataFrame:
        rng = np.random.default_rng(seed)
        users = np.repeat(np.arange(len(lengths)), lengths)
        times = [np.sort(rng.integers(0, max(1, int(length / events_per_second)), length)) for length in lengths]
        return pl.DataFrame(
            {
                "user_id": users,
                "item_id": np.arange(len(users)),
                "timestamp": np.concatenate([*times, np.zeros(0, np.int64)]),
                "action": rng.integers(0, 3, len(users)),
            }
        )

    return make


@pytest.fixture
def listing() -> Callable[[Path], list[str]]:
    """``listing(directory)``: the names in a directory, hidden ones too."""
    return lambda directory: sorted(path.name for path in directory.iterdir())
