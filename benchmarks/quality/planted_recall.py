"""Histories whose next item is decided by one event far back: associative recall at a planted distance.

A history, oldest event first::

    | planted part: num_pairs pairs among noise | distance noise events | query | target | query | target | ...

``binding="event"``: a pair is one event, a value item with a key in the context column; a query is ``query_length`` noise items with
one of these keys, and the target is the value item of that key. ``binding="order"``: a pair is two events, a key item and then its
value item; the query is the key item, ``query_length`` times.

Which key has which value is drawn anew for every history, so nothing can be learned by heart. Whoever does not match the query with a
pair can but guess among the values of the history: a bag of items gives Recall@1 of ``1 / num_pairs``. The query stands at the end
and the pair at least ``distance`` events before it, so the encoder has to bring them together; the decoder's attention over the
memory cannot, because what it asks for does not depend on the history.

A training history has ``num_queries`` queries, independent of each other; one to be evaluated has one.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

Binding = Literal["event", "order"]
Part = Literal["train", "validation", "test"]
NO_KEY = "none"
EVENTS_PER_FRAME = 4_000_000


@dataclass(frozen=True, kw_only=True)
class PlantedRecall:
    """The task.

    Attributes:
        distance: noise events between the planted part and the first query.
        binding: whether a pair is one event or two.
        num_pairs: pairs in a history, all with different keys and different values.
        num_keys: keys to draw from.
        num_values: value items to draw from.
        num_noise: noise items.
        query_length: events of a query.
        num_queries: in a training history.
        num_train: training histories; ``num_validation`` and ``num_test`` more are held out.
        seed: of all draws.
    """

    distance: int
    binding: Binding = "event"
    num_pairs: int = 4
    num_keys: int = 4
    num_values: int = 16
    num_noise: int = 32
    query_length: int = 8
    num_queries: int = 1
    num_train: int = 32_768
    num_validation: int = 512
    num_test: int = 2_048
    seed: int = 0

    def __post_init__(self) -> None:
        """Check that there are enough keys and values.

        Raises:
            ValueError: if a number is not positive, or pairs cannot all differ.
        """
        numbers = ("distance", "num_pairs", "num_keys", "num_values", "num_noise", "query_length", "num_queries")
        for name in (*numbers, "num_train", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"PlantedRecall.{name} must be at least 1, got {getattr(self, name)}")
        most = min(self.num_keys, self.num_values)
        if self.num_pairs > most:
            raise ValueError(f"PlantedRecall.num_pairs must be at most num_keys and num_values, {most}, got {self.num_pairs}")

    @property
    def events_per_pair(self) -> int:
        """One, or two with ``binding="order"``."""
        return 2 if self.binding == "order" else 1

    @property
    def planted_length(self) -> int:
        """Events of the planted part: a quarter of its slots hold pairs."""
        return 4 * self.num_pairs * self.events_per_pair

    @property
    def first_target(self) -> int:
        """Events before the first target."""
        return self.planted_length + self.distance + self.query_length

    @property
    def training_length(self) -> int:
        """Events of a training history: the last target is followed by as many events as are between others."""
        return self.first_target + self.num_queries * (1 + self.query_length)

    @property
    def item_ids(self) -> NDArray[np.int64]:
        """All item ids: values, then noise, then (``binding="order"``) keys."""
        return np.arange(self.num_values + self.num_noise + (self.num_keys if self.binding == "order" else 0))

    @property
    def validation_time(self) -> int:
        """First timestamp of validation targets: no training history has so late an event."""
        return self.training_length

    @property
    def test_time(self) -> int:
        """First timestamp of test targets."""
        return self.training_length + 1

    def num_users(self, part: Part) -> int:
        """Histories of one part."""
        return {"train": self.num_train, "validation": self.num_validation, "test": self.num_test}[part]


@dataclass(frozen=True)
class Histories:
    """``U`` histories of ``T`` events.

    Attributes:
        items: ``(U, T)`` int64 item ids.
        keys: ``(U, T)`` int64 keys of the context column, -1 for none; all -1 with ``binding="order"``.
        times: ``(T,)`` int64; a target and the query after it have one time, so that a cut can fall on targets only.
    """

    items: NDArray[np.int64]
    keys: NDArray[np.int64]
    times: NDArray[np.int64]


def draw_histories(task: PlantedRecall, part: Part, num_users: int, random: np.random.Generator) -> Histories:
    """Draw ``num_users`` independent histories of ``part``: those of validation and test end with their one target."""
    num_queries = task.num_queries if part == "train" else 1
    length = task.training_length if part == "train" else task.first_target + 1
    rows, first_key = np.arange(num_users)[:, None], task.num_values + task.num_noise
    items = random.integers(task.num_values, first_key, size=(num_users, length))
    keys = np.full(items.shape, -1)
    pair_keys = _distinct(task.num_keys, task.num_pairs, num_users, random)
    pair_values = _distinct(task.num_values, task.num_pairs, num_users, random)
    slots = _distinct(task.planted_length // task.events_per_pair, task.num_pairs, num_users, random) * task.events_per_pair
    if task.binding == "event":
        items[rows, slots], keys[rows, slots] = pair_values, pair_keys
    else:
        items[rows, slots], items[rows, slots + 1] = first_key + pair_keys, pair_values
    for number in range(num_queries):
        asked = random.integers(task.num_pairs, size=(num_users, 1))
        target = task.first_target + number * (1 + task.query_length)
        query = slice(target - task.query_length, target)
        if task.binding == "event":
            keys[:, query] = pair_keys[rows, asked]
        else:
            items[:, query] = first_key + pair_keys[rows, asked]
        items[:, target] = pair_values[rows, asked][:, 0]
    return Histories(items, keys, _times(task, part, length))


def _times(task: PlantedRecall, part: Part, length: int) -> NDArray[np.int64]:
    index = np.arange(length)
    after = index - task.first_target
    times = np.where(after < 0, index, task.first_target + after // (1 + task.query_length))
    if part != "train":
        times[-1] = task.validation_time if part == "validation" else task.test_time
    return times


def _distinct(num_choices: int, num_drawn: int, num_users: int, random: np.random.Generator) -> NDArray[np.int64]:
    """``(num_users, num_drawn)`` numbers below ``num_choices``, different within a row, in random order."""
    return np.argsort(random.random((num_users, num_choices)), axis=1)[:, :num_drawn]


def event_log(task: PlantedRecall) -> Iterator[pl.DataFrame]:
    """The log in frames of bounded size: ``user_id``, ``item_id``, ``timestamp``, and ``key`` with ``binding="event"``."""
    random, first_user = np.random.default_rng(task.seed), 0
    users_per_frame = max(1, EVENTS_PER_FRAME // task.training_length)
    parts: tuple[Part, ...] = ("train", "validation", "test")
    for part in parts:
        for first in range(0, task.num_users(part), users_per_frame):
            num_users = min(users_per_frame, task.num_users(part) - first)
            yield _frame(task, first_user, draw_histories(task, part, num_users, random))
            first_user += num_users


def _frame(task: PlantedRecall, first_user: int, histories: Histories) -> pl.DataFrame:
    num_users, length = histories.items.shape
    columns = {
        "user_id": np.repeat(np.arange(first_user, first_user + num_users), length),
        "item_id": histories.items.ravel(),
        "timestamp": np.tile(histories.times, num_users),
    }
    frame = pl.DataFrame(columns)
    if task.binding == "event":
        names = pl.Series("key", [f"key-{key}" for key in range(task.num_keys)] + [NO_KEY], dtype=pl.Categorical)
        frame = frame.with_columns(names.gather(pl.Series(histories.keys.ravel() % (task.num_keys + 1))).cast(pl.String).alias("key"))
    return frame


def recall(task: PlantedRecall, items: NDArray[np.int64], keys: NDArray[np.int64]) -> int | None:
    """The oracle: the target of one history, or None if the events do not hold the pair that is asked for.

    Args:
        task: the task.
        items: ``(T,)`` the newest events that may be read; the query comes last.
        keys: ``(T,)`` their keys.
    """
    before = slice(None, -task.query_length)
    if task.binding == "event":
        found = np.flatnonzero(keys[before] == keys[-1])
        return int(items[found[0]]) if len(found) else None
    found = np.flatnonzero(items[before] == items[-1])
    return int(items[found[0] + 1]) if len(found) else None
