"""A stand-in for a prepared dataset: items, text and training histories, without files."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

USERS_PER_SHARD = 2


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
        for first in range(0, len(self.histories), USERS_PER_SHARD):
            shard = self.histories[first : first + USERS_PER_SHARD]
            items = np.array([item for history in shard for item in (*history, *[0] * self.evaluation_events)], dtype=np.int64)
            kept = np.array(
                [place < len(history) for history in shard for place in range(len(history) + self.evaluation_events)], dtype=bool
            )
            lengths = np.array([len(history) for history in shard])
            yield SimpleNamespace(items=items, validation_begin=lengths, is_training=lambda mask=kept: mask)


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., FakeDataset]:
    return FakeDataset
