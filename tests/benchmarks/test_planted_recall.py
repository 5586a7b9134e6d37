"""The planted task: an oracle solves what the encoder reads; popularity, a bag of items and the newest 50 events do not."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gbla_rec.config import PrepareConfig, SplitConfig, StreamConfig
from gbla_rec.data.evaluation_batches import evaluation_batches
from gbla_rec.data.prepare import prepare
from gbla_rec.data.sampling import training_samples

ROOT = Path(__file__).resolve().parents[2]
NUM_USERS = 2_000


@pytest.fixture(autouse=True)
def root_on_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(ROOT)
    yield


def draw(part, **settings):
    from benchmarks.quality.planted_recall import PlantedRecall, draw_histories

    task = PlantedRecall(**{"distance": 100, **settings})
    return task, draw_histories(task, part, NUM_USERS, np.random.default_rng(0))


def answers(task, histories, last=None):
    """What the oracle says to each test history, from its ``last`` events before the target."""
    from benchmarks.quality.planted_recall import recall

    begin = 0 if last is None else -1 - last
    return [recall(task, items[begin:-1], keys[begin:-1]) for items, keys in zip(histories.items, histories.keys, strict=True)]


@pytest.mark.parametrize("binding", ["event", "order"])
def test_the_oracle_needs_the_far_event(binding):
    task, histories = draw("test", binding=binding)
    targets = list(histories.items[:, -1])
    assert answers(task, histories) == targets
    assert answers(task, histories, last=task.distance + task.query_length) == [None] * NUM_USERS
    assert answers(task, histories, last=50) == [None] * NUM_USERS
    # nor does a value item come by chance among the newest events
    assert (histories.items[:, task.planted_length : -1] >= task.num_values).all()


@pytest.mark.parametrize("binding", ["event", "order"])
def test_popularity_and_a_bag_of_items_only_guess(binding):
    task, histories = draw("test", binding=binding)
    targets = histories.items[:, -1]
    commonest = np.bincount(targets).max() / NUM_USERS
    assert commonest < 1 / task.num_values + 4 * (1 / task.num_values / NUM_USERS) ** 0.5
    # a history has num_pairs values, each of them once, and the target is any of them
    values = [row[row < task.num_values] for row in histories.items[:, :-1]]
    assert all(len(found) == len(set(found)) == task.num_pairs for found in values)
    places = [list(found).index(target) for found, target in zip(values, targets, strict=True)]
    shares = np.bincount(places, minlength=task.num_pairs) / NUM_USERS
    chance = 1 / task.num_pairs
    assert np.abs(shares - chance).max() < 4 * (chance * (1 - chance) / NUM_USERS) ** 0.5
    if binding == "order":
        assert (histories.keys == -1).all()


def test_queries_of_a_training_history_are_independent():
    task, histories = draw("train", num_queries=8)
    step = 1 + task.query_length
    targets = histories.items[:, task.first_target :: step][:, : task.num_queries]
    same = (targets[:, 1:] == targets[:, :-1]).mean()
    assert same == pytest.approx(1 / task.num_pairs, abs=0.02)


@pytest.mark.parametrize("binding", ["event", "order"])
def test_every_sample_that_a_model_gets_is_one_that_the_oracle_solves(tmp_path, binding):
    from benchmarks.quality.planted_recall import PlantedRecall, event_log, recall

    task = PlantedRecall(distance=9, binding=binding, num_queries=3, num_train=40, num_validation=10, num_test=20)
    (tmp_path / "log").mkdir()
    for number, frame in enumerate(event_log(task)):
        frame.write_parquet(tmp_path / "log" / f"{number}.parquet")
    context = ("key",) if binding == "event" else ()
    split = SplitConfig(kind="temporal", validation_time=task.validation_time, test_time=task.test_time)
    dataset = prepare(PrepareConfig(name="planted", events=tmp_path / "log", context_columns=context, split=split), tmp_path / "dataset")
    item_ids = dataset.items()["item_id"].to_numpy()
    names = dataset.context_values("key").to_list() if context else []
    key_of_code = np.array([-1 if name == "none" else int(name.removeprefix("key-")) for name in names])

    def is_solved(items, keys, target):
        return recall(task, item_ids[items], key_of_code[keys] if context else np.full(len(items), -1)) == item_ids[target]

    shard = dataset.read_shard(0, context)
    stream = StreamConfig(
        min_history_length=task.first_target,
        max_history_length=task.training_length,
        targets_per_cut=1,
        max_cuts_per_history=task.num_queries,
    )
    samples = training_samples(shard, stream, seed=0, epoch=0, keep_ties=True)
    assert len(samples) == task.num_train * task.num_queries
    codes = shard.context["key"] if context else np.zeros(len(shard.items), int)
    for source, length, num_targets in zip(samples.source, samples.lengths, samples.num_targets, strict=True):
        cut = source + length
        assert num_targets == 1 and is_solved(shard.items[source:cut], codes[source:cut], shard.items[cut])
    for part, num_users in (("validation", task.num_validation), ("test", task.num_test)):
        (batch,) = evaluation_batches(dataset, part, tokens_per_batch=10**6, max_history_length=task.training_length, context=context)
        assert len(batch.user_rows) == len(batch.targets) == num_users
        for row, target in enumerate(batch.targets):
            inside = slice(batch.offsets[row], batch.offsets[row + 1])
            assert is_solved(batch.items[inside], batch.context["key"][inside] if context else None, target)


def test_the_log_has_every_history_and_item_in_frames_of_any_size(monkeypatch):
    from benchmarks.quality import planted_recall

    task = planted_recall.PlantedRecall(distance=9, num_queries=2, num_train=300, num_validation=2, num_test=3)
    whole = pl.concat(planted_recall.event_log(task))
    assert whole["user_id"].n_unique() == 305 and sorted(whole["item_id"].unique()) == list(task.item_ids)
    assert set(whole["key"].unique()) == {"none", *(f"key-{key}" for key in range(task.num_keys))}
    monkeypatch.setattr(planted_recall, "EVENTS_PER_FRAME", 1_000)
    parts = list(planted_recall.event_log(task))
    assert len(parts) > 3 and sum(map(len, parts)) == len(whole)


def test_pairs_that_cannot_differ_are_refused():
    from benchmarks.quality.planted_recall import PlantedRecall

    with pytest.raises(ValueError, match="num_pairs must be at most num_keys and num_values, 4, got 5"):
        PlantedRecall(distance=1, num_pairs=5)
    with pytest.raises(ValueError, match="distance must be at least 1, got 0"):
        PlantedRecall(distance=0)
