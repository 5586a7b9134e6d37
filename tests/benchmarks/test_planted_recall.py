"""The planted task: an oracle solves what the encoder reads; popularity, a bag of items and the newest 50 events do not."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gbla_apps.run_config_options import parse_run_config
from gbla_rec.config import PrepareConfig, SplitConfig
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


def each(histories):
    """Items and keys of one history after the other."""
    ends = histories.offsets[1:-1]
    return zip(np.split(histories.items, ends), np.split(histories.keys, ends), strict=True)


def in_rows(histories):
    """``(U, T)`` items of histories of one length."""
    return histories.items.reshape(NUM_USERS, -1)


def answers(task, histories, last=None):
    """What the oracle says to each test history, from its ``last`` events before the target."""
    from benchmarks.quality.planted_recall import recall

    begin = 0 if last is None else -1 - last
    return [recall(task, items[begin:-1], keys[begin:-1]) for items, keys in each(histories)]


@pytest.mark.parametrize("shortest", [None, 3])
@pytest.mark.parametrize("binding", ["event", "order"])
def test_the_oracle_needs_the_far_event(binding, shortest):
    task, histories = draw("test", binding=binding, shortest_distance=shortest)
    items = in_rows(histories)
    assert items.shape[1] == task.first_target + 1
    assert answers(task, histories) == list(items[:, -1])
    assert answers(task, histories, last=task.distance + task.query_length) == [None] * NUM_USERS
    assert answers(task, histories, last=50) == [None] * NUM_USERS
    # nor does a value item come by chance among the newest events
    assert (items[:, task.planted_length : -1] >= task.num_values).all()


@pytest.mark.parametrize("binding", ["event", "order"])
def test_popularity_and_a_bag_of_items_only_guess(binding):
    task, histories = draw("test", binding=binding)
    items = in_rows(histories)
    targets = items[:, -1]
    commonest = np.bincount(targets).max() / NUM_USERS
    assert commonest < 1 / task.num_values + 4 * (1 / task.num_values / NUM_USERS) ** 0.5
    # a history has num_pairs values, each of them once, and the target is any of them
    values = [row[row < task.num_values] for row in items[:, :-1]]
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
    targets = in_rows(histories)[:, task.first_target :: step][:, : task.num_queries]
    same = (targets[:, 1:] == targets[:, :-1]).mean()
    assert same == pytest.approx(1 / task.num_pairs, abs=0.02)


@pytest.mark.parametrize("binding", ["event", "order"])
def test_training_distances_are_drawn_log_uniformly_from_the_shortest_to_that_of_the_task(binding):
    task, histories = draw("train", binding=binding, distance=40, shortest_distance=5)
    after_target = task.query_length
    distances = []
    for items, keys in each(histories):
        items, keys = items[:-after_target], keys[:-after_target]
        first_query = len(items) - 1 - task.query_length
        marks = keys if binding == "event" else items
        assert (marks[first_query:-1] == marks[-2]).all()
        (pair,) = np.flatnonzero(marks[:first_query] == marks[-2])
        assert items[pair + task.events_per_pair - 1] == items[-1]
        assert pair + task.events_per_pair <= task.planted_length
        distances.append(first_query - task.planted_length)
        # nothing but noise in between
        noise = slice(task.planted_length, first_query)
        assert (keys[noise] == -1).all() and (items[noise] >= task.num_values).all()
        assert (items[noise] < task.num_values + task.num_noise).all()
    assert min(distances) == 5 and max(distances) == 40
    for middle in (8, 13, 20, 30):
        share = np.log(middle / 5) / np.log(41 / 5)
        assert abs(np.mean(np.array(distances) < middle) - share) < 4 * (share * (1 - share) / NUM_USERS) ** 0.5


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"distance": 30}, "ccc74b3a819e7f73ec8f0fb4447f3f4b6a0facc8b6d6d6f4f12ee35c3175fcef"),
        ({"distance": 30, "binding": "order"}, "7c9f39734ef6122713e0b22155db82569cda59e789539184fba462c663a2c48c"),
        ({"distance": 9, "num_queries": 3}, "c3270948baf4a8eb199fca53d86d8ead8f0b60121e2c24a4b959f7c1a263f0c4"),
    ],
)
def test_logs_of_one_distance_stay_those_that_runs_were_trained_on(settings, expected, monkeypatch):
    from benchmarks.quality import planted_recall

    monkeypatch.setattr(planted_recall, "EVENTS_PER_FRAME", 1_000)
    digest = hashlib.sha256()
    for frame in planted_recall.event_log(planted_recall.PlantedRecall(**settings, num_train=60, num_validation=5, num_test=7)):
        digest.update(frame.write_csv().encode())
    assert digest.hexdigest() == expected


SEVERAL_QUERIES, SEVERAL_DISTANCES = {"num_queries": 3}, {"shortest_distance": 2}


@pytest.mark.parametrize("settings", [SEVERAL_QUERIES, SEVERAL_DISTANCES])
@pytest.mark.parametrize("binding", ["event", "order"])
def test_every_sample_that_a_model_gets_is_one_that_the_oracle_solves(tmp_path, monkeypatch, binding, settings):
    from benchmarks.quality import long_range
    from benchmarks.quality.planted_recall import PlantedRecall, event_log, recall

    task = PlantedRecall(distance=9, binding=binding, num_train=40, num_validation=10, num_test=20, **settings)
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

    monkeypatch.setitem(long_range.TASKS, "planted", task)
    monkeypatch.setitem(long_range.TOKENS_PER_BATCH, task.distance, 1_000)
    config = parse_run_config("train", "", ("--recipe", long_range.RECIPE, *long_range.training_options("planted")))
    shard = dataset.read_shard(0, context)
    codes = shard.context["key"] if context else np.zeros(len(shard.items), int)
    epochs = [training_samples(shard, config.stream, seed=0, epoch=epoch, keep_ties=True) for epoch in range(3)]
    for samples in epochs:
        assert len(samples) == task.num_train * task.num_queries
        assert (samples.begin == 0).all()
        for source, length, num_targets in zip(samples.source, samples.lengths, samples.num_targets, strict=True):
            cut = source + length
            assert num_targets == 1 and is_solved(shard.items[source:cut], codes[source:cut], shard.items[cut])
    for part, num_users in (("validation", task.num_validation), ("test", task.num_test)):
        (batch,) = evaluation_batches(dataset, part, tokens_per_batch=10**6, max_history_length=task.training_length, context=context)
        assert len(batch.user_rows) == len(batch.targets) == num_users
        assert (np.diff(batch.offsets) == task.first_target).all()
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


def test_distances_that_no_cut_could_follow_are_refused():
    from benchmarks.quality.planted_recall import PlantedRecall

    for shortest in (0, 10):
        with pytest.raises(ValueError, match=rf"shortest_distance must lie in \[1, distance\], \[1, 9\], got {shortest}"):
            PlantedRecall(distance=9, shortest_distance=shortest)
    with pytest.raises(ValueError, match="num_queries must be 1 with a shortest_distance, got 2"):
        PlantedRecall(distance=9, shortest_distance=3, num_queries=2)
