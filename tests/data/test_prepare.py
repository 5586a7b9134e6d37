"""``prepare`` says what a naive in-memory reading of the log says, however the log is stored."""

import logging
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gbla_rec.config import SplitConfig
from gbla_rec.data.dataset import PreparedDataset

PrepareFrame = Callable[..., PreparedDataset]
INTEGERS = [-(2**63), -1, 0, 7, 2**53, 2**53 + 1, 2**63 - 2, 2**63 - 1]
# quotes, separators, line breaks and code points beyond 16 bits must survive CSV
STRINGS = ["a", "A", "é", "日本", "😀", 'quo"te', "com,ma", "line\nbreak", " blank ", "007", "12345678901234567890"]
TIMES = [-(2**63), -5, 0, 1, 2, 3, 2**53 + 1, 2**63 - 1]
ACTIONS = ["buy", "click", None]


@st.composite
def logs(draw: st.DrawFn) -> pl.DataFrame:
    """Small pools, so that users repeat, times tie and whole events occur twice."""
    pools: list[list[Any]] = [INTEGERS, STRINGS]
    users, items = (draw(st.sampled_from(pools)) for _ in range(2))
    event = st.tuples(st.sampled_from(users), st.sampled_from(items), st.sampled_from(TIMES), st.sampled_from(ACTIONS))
    events = draw(st.lists(event, min_size=1, max_size=60))
    types = {name: pl.Int64 if pool is INTEGERS else pl.String for name, pool in (("user_id", users), ("item_id", items))}
    return pl.DataFrame(events, schema={**types, "timestamp": pl.Int64, "action": pl.String}, orient="row")


def naive_histories(frame: pl.DataFrame, num_targets: int) -> dict[Any, tuple[Any, ...]]:
    """The whole job with Python's sort and dictionaries; a missing action sorts last."""
    item_ids = sorted(set(frame["item_id"]))
    actions = sorted(set(frame["action"]), key=lambda value: (value is None, value))
    histories: dict[Any, list[tuple[int, int, int]]] = {}
    for user, item, time, action in frame.iter_rows():
        histories.setdefault(user, []).append((time, item_ids.index(item), actions.index(action)))
    result = {}
    for user in sorted(histories):
        events = sorted(histories[user])
        times = [time for time, _, _ in events]
        cuts = [len(events), len(events)]
        if len(events) >= 2 * num_targets + 1:
            cuts = [times.index(times[-2 * num_targets]), times.index(times[-num_targets])]
        if cuts[0] == 0:
            cuts = [len(events), len(events)]
        result[user] = (times, [item for _, item, _ in events], [action for _, _, action in events], *cuts)
    return result


def stored_histories(dataset: PreparedDataset) -> dict[Any, tuple[Any, ...]]:
    result = {}
    for shard in dataset.iterate_shards(["action"]):
        assert shard.timestamps is not None
        for user, user_id in enumerate(shard.user_ids):
            events = slice(int(shard.offsets[user]), int(shard.offsets[user + 1]))
            columns = (shard.timestamps[events], shard.items[events], shard.context["action"][events])
            result[user_id] = (*(column.tolist() for column in columns), int(shard.validation_begin[user]), int(shard.test_begin[user]))
    return result


@given(frame=logs(), num_targets=st.integers(1, 3), max_events=st.sampled_from([1, 4, 1000]), num_files=st.integers(1, 3))
def test_prepare_says_what_a_naive_reading_says(
    prepare_frame: PrepareFrame, frame: pl.DataFrame, num_targets: int, max_events: int, num_files: int
) -> None:
    dataset = prepare_frame(
        frame, num_files=num_files, context_columns=("action",), max_events_per_shard=max_events, split=SplitConfig(num_targets=num_targets)
    )
    expected = naive_histories(frame, num_targets)
    stored = stored_histories(dataset)
    assert stored == expected
    assert list(stored) == list(expected)
    assert dataset.items()["item_id"].to_list() == sorted(set(frame["item_id"]))
    train = Counter(item for _, items, _, begin, _ in expected.values() for item in items[:begin])
    assert dataset.train_counts().tolist() == [train[item] for item in range(dataset.manifest.num_items)]
    manifest = dataset.manifest
    assert (manifest.num_users, manifest.num_events) == (len(expected), len(frame))
    assert manifest.num_validation_users == sum(0 < begin < test for *_, begin, test in expected.values())
    assert manifest.num_test_users == sum(0 < test < len(times) for times, _, _, _, test in expected.values())
    assert all(shard.num_users == 1 or shard.num_events <= max_events for shard in manifest.shards)


@given(frame=logs(), seed=st.integers(0, 99))
@example(frame=pl.DataFrame({"user_id": ["a"], "item_id": [2**63 - 1], "timestamp": [0], "action": ["buy"]}), seed=0)
def test_content_depends_on_neither_row_order_nor_files_nor_shards(prepare_frame: PrepareFrame, frame: pl.DataFrame, seed: int) -> None:
    settings = {"context_columns": ("action",)}
    whole = prepare_frame(frame, **settings)
    shuffled = prepare_frame(frame.sample(fraction=1.0, shuffle=True, seed=seed), num_files=3, max_events_per_shard=2, **settings)
    assert shuffled.manifest.content_hash == whole.manifest.content_hash
    assert stored_histories(shuffled) == stored_histories(whole)
    shuffled.verify()


@given(frame=logs())
def test_csv_equals_parquet(prepare_frame: PrepareFrame, frame: pl.DataFrame) -> None:
    # text that is all integers means integers in a CSV: keep one plain string in each string column
    plain = pl.DataFrame({"user_id": ["a"], "item_id": ["a"], "timestamp": [0], "action": ["buy"]})
    ints = [name for name in ("user_id", "item_id") if frame.schema[name] == pl.Int64]
    frame = pl.concat([frame, plain.with_columns(pl.lit(7, pl.Int64).alias(name) for name in ints)])
    parquet = prepare_frame(frame, context_columns=("action",))
    csv = prepare_frame(frame, csv=True, num_files=2, context_columns=("action",))
    assert csv.manifest.content_hash == parquet.manifest.content_hash
    assert (csv.manifest.user_id_type, csv.manifest.item_id_type) == (parquet.manifest.user_id_type, parquet.manifest.item_id_type)


@given(frame=logs(), change=st.sampled_from(["user_id", "item_id", "timestamp", "action"]))
def test_content_hash_sees_every_column(prepare_frame: PrepareFrame, frame: pl.DataFrame, change: str) -> None:
    new = {pl.Int64: 5, pl.String: "new"}[type(frame.schema[change])]
    first = pl.int_range(pl.len()) == 0
    changed = frame.with_columns(pl.when(first).then(pl.lit(new)).otherwise(pl.col(change)).alias(change))
    one, other = (prepare_frame(log, context_columns=("action",)) for log in (frame, changed))
    assert one.manifest.content_hash != other.manifest.content_hash


@given(frame=logs(), has_times=st.booleans())
def test_grouped_sequences_equal_the_event_log(prepare_frame: PrepareFrame, frame: pl.DataFrame, has_times: bool) -> None:
    frame = frame.sort("user_id", "timestamp", "item_id", pl.col("action"), nulls_last=True, maintain_order=True)
    grouped = frame.group_by("user_id").agg("item_id", "timestamp", "action").rename({"item_id": "items"})
    if not has_times:
        grouped = grouped.drop("timestamp")
    dataset = prepare_frame(grouped, sequence_column="items", context_columns=("action",), num_files=2, max_events_per_shard=7)
    expected = naive_histories(frame, 1)
    assert dataset.manifest.has_timestamps is has_times
    if has_times:
        assert stored_histories(dataset) == expected
        return
    for user_id, (_, items, actions, _, _) in expected.items():
        history = dataset.history(user_id)
        assert history.timestamps is None
        assert (history.items.tolist(), history.context["action"].tolist()) == (items, actions)


@given(frame=logs(), max_events=st.sampled_from([1, 1000]))
def test_temporal_split_takes_exact_quantiles_of_all_times(prepare_frame: PrepareFrame, frame: pl.DataFrame, max_events: int) -> None:
    times = sorted(frame["timestamp"])
    validation_time, test_time = times[int(0.5 * len(times))], times[int(0.75 * len(times))]
    split = SplitConfig(kind="temporal", temporal_fraction=0.25)
    if validation_time == test_time:
        with pytest.raises(ValueError, match="share that timestamp"):
            prepare_frame(frame, split=split)
        return
    dataset = prepare_frame(frame, split=split, max_events_per_shard=max_events)
    assert (dataset.manifest.split.validation_time, dataset.manifest.split.test_time) == (validation_time, test_time)
    for shard in dataset.iterate_shards():
        assert shard.timestamps is not None
        assert np.array_equal(shard.is_training(), shard.timestamps < validation_time)


def test_sequences_without_times_keep_their_order(prepare_frame: PrepareFrame) -> None:
    frame = pl.DataFrame({"user_id": ["b", "a"], "items": [[9, 1, 5, 1], [3]]})
    dataset = prepare_frame(frame, sequence_column="items")
    assert dataset.items()["item_id"].to_list() == [1, 3, 5, 9]
    assert dataset.history("b").items.tolist() == [3, 0, 2, 0]
    assert (dataset.history("b").validation_begin, dataset.history("b").test_begin) == (2, 3)


def test_ordered_ties_trust_the_file(prepare_frame: PrepareFrame) -> None:
    frame = pl.DataFrame({"user_id": [1] * 6, "item_id": [9, 3, 7, 1, 8, 2], "timestamp": [5, 5, 5, 5, 5, 4]})
    ordered = prepare_frame(frame, split=SplitConfig(ties="ordered"), num_files=2)
    assert ordered.items()["item_id"].gather(ordered.history(1).items).to_list() == [2, 9, 3, 7, 1, 8]
    assert (ordered.history(1).validation_begin, ordered.history(1).test_begin) == (4, 5)
    together = prepare_frame(frame)
    assert together.items()["item_id"].gather(together.history(1).items).to_list() == [2, 1, 3, 7, 8, 9]
    assert (together.history(1).validation_begin, together.history(1).test_begin) == (1, 1)


@pytest.mark.parametrize(
    "values",
    [
        ["2020-01-01", "2020-01-01T00:00:00.5", "2020-01-01 00:00:01Z", "2020-01-01T02:00:02+02:00", "2020-01-01 00:01"],
        [0, 500_000, 1_000_000, 2_000_000, 60_000_000],
    ],
)
@pytest.mark.parametrize("csv", [True, False])
def test_iso_times_are_microseconds_utc(prepare_frame: PrepareFrame, values: list[Any], csv: bool) -> None:
    start = 0 if isinstance(values[0], int) else 1_577_836_800_000_000
    dataset = prepare_frame(pl.DataFrame({"user_id": [1] * 5, "item_id": range(5), "timestamp": values}), csv=csv)
    times = dataset.history(1).timestamps
    assert times is not None
    assert (times - start).tolist() == [0, 500_000, 1_000_000, 2_000_000, 60_000_000]


@pytest.mark.parametrize("dtype", [pl.Date(), pl.Datetime("ms"), pl.Datetime("ns"), pl.Datetime("us", "Asia/Tokyo")])
def test_datetimes_are_microseconds_utc(prepare_frame: PrepareFrame, dtype: pl.DataType) -> None:
    times = pl.Series("timestamp", [0, 86_400_000], pl.Int64).cast(pl.Datetime("ms", "UTC"))
    times = times.dt.convert_time_zone("Asia/Tokyo") if dtype == pl.Datetime("us", "Asia/Tokyo") else times.dt.replace_time_zone(None)
    dataset = prepare_frame(pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2], "timestamp": times.cast(dtype)}))
    assert dataset.history(1).timestamps is not None
    assert np.array_equal(dataset.history(1).timestamps, [0, 86_400_000_000])  # type: ignore[arg-type]


@pytest.mark.parametrize("csv", [True, False])
def test_categories_are_sorted_with_the_missing_one_last(prepare_frame: PrepareFrame, csv: bool) -> None:
    columns = {
        "rating": [4.5, None, float("nan"), -0.0, 0.0, 10.0],
        "level": [10, 9, None, 9, 2**62 + 1, 2**62],
        "zip": ["007", "7", "07", "7", None, "1e2"],
    }
    frame = pl.DataFrame({"user_id": [1] * 6, "item_id": range(6), "timestamp": range(6), **columns}, strict=False)
    dataset = prepare_frame(frame, csv=csv, context_columns=tuple(columns))
    assert dataset.context_values("rating").to_list() == [0.0, 4.5, 10.0, None]
    assert dataset.context_values("level").to_list() == [9, 10, 2**62, 2**62 + 1, None]
    assert dataset.context_values("zip").to_list() == ["007", "07", "1e2", "7", None]
    assert dataset.history(1).context["rating"].tolist() == [1, 3, 3, 0, 0, 2]
    assert dataset.context_sizes() == {"rating": 4, "level": 5, "zip": 5}


def test_catalogue_items_get_an_index_and_absent_ones_a_warning(prepare_frame: PrepareFrame, caplog: pytest.LogCaptureFixture) -> None:
    log = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [30, 20, 30], "timestamp": [1, 2, 3]})
    table = pl.DataFrame({"item_id": [40, 20], "title": ["new", None], "tags": [["x", "y"], []], "price": [1.0, 2.0]})
    with caplog.at_level(logging.WARNING):
        dataset = prepare_frame(log, items=table, text_columns=("title", "tags"))
    assert "1 of 2 items of the log (2 of 3 events)" in caplog.text
    assert "30" in caplog.text
    assert dataset.items().rows() == [(0, 20, 1, None, ""), (1, 30, 2, None, None), (2, 40, 0, "new", "x, y")]
    dataset.verify()


def test_a_log_with_rows_twice_is_kept_with_a_warning(prepare_frame: PrepareFrame, caplog: pytest.LogCaptureFixture) -> None:
    # alike in all but one column, or in all but the user at the border of two histories: no repeats
    rows = [(1, 5, 1, "a"), (1, 5, 2, "a"), (1, 5, 2, "b"), (1, 6, 2, "b"), (2, 6, 2, "b")]
    log = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "action"], orient="row")
    with caplog.at_level(logging.WARNING):
        prepare_frame(log, context_columns=("action",))
        prepare_frame(pl.DataFrame({"user_id": [1, 2], "items": [[5, 5, 5], [6]]}), sequence_column="items")
        assert not caplog.text
        twice = prepare_frame(pl.concat([log, log[:3]]), num_files=2, csv=True, context_columns=("action",))
    assert twice.manifest.num_events == 8 and "3 of 8 events repeat another one of their user" in caplog.text


@pytest.mark.parametrize("csv", [False, True])
def test_blank_ids_are_kept_with_a_warning(prepare_frame: PrepareFrame, caplog: pytest.LogCaptureFixture, csv: bool) -> None:
    log = pl.DataFrame({"user_id": ["", "u", "", " "], "item_id": ["a", "\t", "b", "c"], "timestamp": [1, 2, 3, 4]})
    with caplog.at_level(logging.WARNING):
        prepare_frame(log.with_columns(pl.lit("x").alias("user_id"), pl.lit("y").alias("item_id")), csv=csv)
        prepare_frame(log.with_columns(user_id=pl.lit(0), item_id=pl.lit(0)), csv=csv)
        assert "blank" not in caplog.text
        dataset = prepare_frame(log, csv=csv)
    assert "3 of 4 events have a blank user id, ''" in caplog.text and "1 of 4 events have a blank item id, '\\t'" in caplog.text
    assert dataset.manifest.num_users == 3 and dataset.history("").items.tolist() == [1, 2]


def test_every_string_column_is_text_by_default(prepare_frame: PrepareFrame) -> None:
    log = pl.DataFrame({"user_id": [1], "item_id": ["x"], "timestamp": [1]})
    table = pl.DataFrame({"title": ["t"], "item_id": ["x"], "year": [1999], "genre": ["g"]})
    assert prepare_frame(log, items=table).manifest.text_columns == ("title", "genre")


def test_string_ids_on_either_side_make_ids_strings(prepare_frame: PrepareFrame) -> None:
    log = pl.DataFrame({"user_id": [1], "item_id": [2**53 + 1], "timestamp": [1]})
    dataset = prepare_frame(log, items=pl.DataFrame({"item_id": [str(2**53 + 1)], "title": ["t"]}))
    assert dataset.items().rows() == [(0, str(2**53 + 1), 1, "t")]


def test_a_history_of_100000_events_is_a_shard_alone(prepare_frame: PrepareFrame) -> None:
    rng = np.random.default_rng(0)
    users = np.concatenate([np.full(100_000, 5), [1, 9]])
    frame = pl.DataFrame({"user_id": users, "item_id": rng.integers(0, 50, len(users)), "timestamp": rng.permutation(len(users))})
    dataset = prepare_frame(frame, max_events_per_shard=1000)
    assert [shard.num_events for shard in dataset.manifest.shards] == [1, 100_000, 1]
    expected = frame.filter(pl.col("user_id") == 5).sort("timestamp")["item_id"].to_numpy()
    assert np.array_equal(dataset.history(5).items, expected)
