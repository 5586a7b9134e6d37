"""A stand-in for a prepared dataset: items, text and training histories, without files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest


@dataclass
class FakeDataset:
    item_ids: Sequence[int] | Sequence[str]
    text: dict[str, Sequence[str | None]] = field(default_factory=dict)
    histories: Sequence[Sequence[int]] = ()
    """Item indices of each user's training events."""
    evaluation_events: int = 0
    """Each history ends in that many further events (of item 0), which are not for training."""
    name: str = "fake"
    path: Path = Path("fake")

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(
            name=self.name, num_items=len(self.item_ids), text_columns=tuple(self.text), content_hash=f"hash of {list(self.item_ids)}"
        )

    def items(self) -> pl.DataFrame:
        texts = {name: pl.Series(name, column, dtype=pl.String) for name, column in self.text.items()}
        index = np.arange(len(self.item_ids))
        return pl.DataFrame({"item_index": index, "item_id": list(self.item_ids), "num_train_events": 0 * index, **texts})

    def iterate_shards(self) -> Iterator[Any]:
        for history in self.histories:
            events = np.array([*history, *[0] * self.evaluation_events], dtype=np.int64)
            is_training = np.arange(len(events)) < len(history)
            yield SimpleNamespace(items=events, validation_begin=np.array([len(history)]), is_training=lambda mask=is_training: mask)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., FakeDataset]:
    return FakeDataset
