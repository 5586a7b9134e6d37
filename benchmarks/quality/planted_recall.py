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

``shortest_distance``: every training history has a distance of its own, log-uniform from this one up to ``distance``, so that what is
learnt on short histories carries over to longer ones; those to be evaluated have ``distance`` all the same.
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
        distance: noise events between the planted part and the first query; of all histories, or of the longest training histories and
            of all to be evaluated.
        shortest_distance: of training histories; None: all have ``distance``.
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
    shortest_distance: int | None = None
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
            ValueError: if a number is not positive, pairs cannot all differ, or ``shortest_distance`` is above ``distance`` or beside
                several queries, which would be at other places in every history.
        """
        numbers = ("distance", "num_pairs", "num_keys", "num_values", "num_noise", "query_length", "num_queries")
        for name in (*numbers, "num_train", "num_validation", "num_test"):
            if getattr(self, name) < 1:
                raise ValueError(f"PlantedRecall.{name} must be at least 1, got {getattr(self, name)}")
        most = min(self.num_keys, self.num_values)
        if self.num_pairs > most:
            raise ValueError(f"PlantedRecall.num_pairs must be at most num_keys and num_values, {most}, got {self.num_pairs}")
        if self.shortest_distance is not None:
            if not 1 <= self.shortest_distance <= self.distance:
                raise ValueError(
                    f"PlantedRecall.shortest_distance must lie in [1, distance], [1, {self.distance}], got {self.shortest_distance}"
                )
            if self.num_queries > 1:
                raise ValueError(f"PlantedRecall.num_queries must be 1 with a shortest_distance, got {self.num_queries}")

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
        """Events before the first target at the full distance."""
        return self.planted_length + self.distance + self.query_length

    @property
    def earliest_target(self) -> int:
        """Events before the first target of the shortest training history."""
        return self.first_target if self.shortest_distance is None else self.first_target - self.distance + self.shortest_distance

    @property
    def training_length(self) -> int:
        """Events of the longest training history: the last target is followed by as many events as are between others."""
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
    """``U`` jagged histories of ``L`` events altogether.

    Attributes:
        items: ``(L,)`` int64 item ids.
        keys: ``(L,)`` int64 keys of the context column, -1 for none; all -1 with ``binding="order"``.
        times: ``(L,)`` int64; a target and the query after it have one time, so that a cut can fall on targets only.
        offsets: ``(U + 1,)`` int64; history ``u`` is ``offsets[u]:offsets[u + 1]``.
    """

    items: NDArray[np.int64]
    keys: NDArray[np.int64]
    times: NDArray[np.int64]
    offsets: NDArray[np.int64]


def draw_histories(task: PlantedRecall, part: Part, num_users: int, random: np.random.Generator) -> Histories:
    """Draw ``num_users`` independent histories of ``part``: those of validation and test end with their one target."""
    num_queries = task.num_queries if part == "train" else 1
    first_targets = task.first_target - task.distance + _distances(task, part, num_users, random)
    lengths = first_targets + (num_queries * (1 + task.query_length) if part == "train" else 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    # columns: one row a history
    rows, starts, targets = np.arange(num_users)[:, None], offsets[:-1, None], (offsets[:-1] + first_targets)[:, None]
    first_key = task.num_values + task.num_noise
    items = random.integers(task.num_values, first_key, size=offsets[-1])
    keys = np.full(items.shape, -1)
    pair_keys = _distinct(task.num_keys, task.num_pairs, num_users, random)
    pair_values = _distinct(task.num_values, task.num_pairs, num_users, random)
    slots = _distinct(task.planted_length // task.events_per_pair, task.num_pairs, num_users, random) * task.events_per_pair
    if task.binding == "event":
        items[starts + slots], keys[starts + slots] = pair_values, pair_keys
    else:
        items[starts + slots], items[starts + slots + 1] = first_key + pair_keys, pair_values
    for number in range(num_queries):
        asked = random.integers(task.num_pairs, size=(num_users, 1))
        target = targets + number * (1 + task.query_length)
        query = target - 1 - np.arange(task.query_length)
        if task.binding == "event":
            keys[query] = pair_keys[rows, asked]
        else:
            items[query] = first_key + pair_keys[rows, asked]
        items[target] = pair_values[rows, asked]
    return Histories(items, keys, _times(task, part, first_targets, offsets), offsets)


def _distances(task: PlantedRecall, part: Part, num_users: int, random: np.random.Generator) -> NDArray[np.int64]:
    """``(num_users,)`` distances: of the task, or drawn so that their logarithms are uniform."""
    if part != "train" or task.shortest_distance is None:
        return np.full(num_users, task.distance)
    # numbers from a distance up to the next one count for it, so that both ends are drawn
    logarithms = random.uniform(np.log(task.shortest_distance), np.log(task.distance + 1), size=num_users)
    return np.clip(np.exp(logarithms).astype(np.int64), task.shortest_distance, task.distance)


def _times(task: PlantedRecall, part: Part, first_targets: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
    lengths = np.diff(offsets)
    index = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    first_target = np.repeat(first_targets, lengths)
    after = index - first_target
    times = np.where(after < 0, index, first_target + after // (1 + task.query_length))
    if part != "train":
        times[offsets[1:] - 1] = task.validation_time if part == "validation" else task.test_time
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
    lengths = np.diff(histories.offsets)
    columns = {
        "user_id": np.repeat(np.arange(first_user, first_user + len(lengths)), lengths),
        "item_id": histories.items,
        "timestamp": histories.times,
    }
    frame = pl.DataFrame(columns)
    if task.binding == "event":
        names = pl.Series("key", [f"key-{key}" for key in range(task.num_keys)] + [NO_KEY], dtype=pl.Categorical)
        frame = frame.with_columns(names.gather(pl.Series(histories.keys % (task.num_keys + 1))).cast(pl.String).alias("key"))
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
