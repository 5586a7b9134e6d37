"""Laws of the splits: nothing is lost, time only moves forward, ties stay on one side."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gbla_rec.config import SplitConfig
from gbla_rec.data.schema import SplitInfo
from gbla_rec.data.splits import quantile_time, resolve_split, split_points, tie_group_starts

Int64Array = NDArray[np.int64]
TIMES = st.one_of(st.integers(0, 6), st.sampled_from([-(2**63), 2**63 - 1, 2**53, 2**53 + 1]))
HISTORIES = st.lists(st.lists(TIMES, min_size=1, max_size=12).map(sorted), min_size=1, max_size=6)


def flatten(histories: list[list[int]]) -> tuple[Int64Array, Int64Array]:
    offsets = np.cumsum([0] + [len(history) for history in histories]).astype(np.int64)
    return offsets, np.array([time for history in histories for time in history], np.int64)


def leave_last(num_targets: int, ties: str) -> SplitInfo:
    return SplitInfo("leave_last", ties, num_targets, None, None)


@given(histories=HISTORIES, num_targets=st.integers(1, 3))
@example(histories=[[1, 1, 1], [1, 1, 2], [1, 2, 2, 2], [0, 1, 2]], num_targets=1)
def test_leave_last_follows_its_rule(histories: list[list[int]], num_targets: int) -> None:
    validation_begin, test_begin = split_points(*flatten(histories), leave_last(num_targets, "together"))
    for times, validation, test in zip(histories, validation_begin, test_begin, strict=True):
        n, k = len(times), num_targets
        cuts = (times.index(times[n - 2 * k]), times.index(times[n - k])) if n >= 2 * k + 1 else (0, 0)
        assert (validation, test) == (cuts if cuts[0] > 0 else (n, n))


@given(histories=HISTORIES, num_targets=st.integers(1, 3))
def test_ties_stay_on_one_side(histories: list[list[int]], num_targets: int) -> None:
    for times, *cuts in zip(histories, *split_points(*flatten(histories), leave_last(num_targets, "together")), strict=True):
        for cut in cuts:
            assert cut == len(times) or times[cut - 1] < times[cut]


@given(histories=HISTORIES, num_targets=st.integers(1, 3), has_times=st.booleans())
def test_ordered_or_untimed_histories_have_exactly_k_targets(histories: list[list[int]], num_targets: int, has_times: bool) -> None:
    offsets, times = flatten(histories)
    ordered = split_points(offsets, times, leave_last(num_targets, "ordered"))
    untimed = split_points(offsets, None, leave_last(num_targets, "together"))
    for points in (ordered, untimed):
        for n, validation, test in zip(np.diff(offsets), *points, strict=True):
            assert (validation, test) == ((n - 2 * num_targets, n - num_targets) if n > 2 * num_targets else (n, n))


@given(histories=HISTORIES, validation_time=st.integers(-1, 7), gap=st.integers(1, 3))
def test_temporal_puts_each_event_where_its_time_says(histories: list[list[int]], validation_time: int, gap: int) -> None:
    split = SplitInfo("temporal", "together", 1, validation_time, validation_time + gap)
    for times, validation, test in zip(histories, *split_points(*flatten(histories), split), strict=True):
        assert validation == sum(time < validation_time for time in times)
        assert test == sum(time < validation_time + gap for time in times)


@given(histories=HISTORIES)
def test_tie_groups_start_at_their_first_event(histories: list[list[int]]) -> None:
    offsets, times = flatten(histories)
    expected = [offset + history.index(time) for offset, history in zip(offsets, histories, strict=False) for time in history]
    assert tie_group_starts(offsets, times).tolist() == expected
    assert tie_group_starts(offsets, None).tolist() == list(range(len(times)))


@given(times=st.lists(st.one_of(TIMES, st.integers(-(2**63), 2**63 - 1)), min_size=1, max_size=50), fraction=st.floats(0, 0.999))
def test_quantile_is_the_order_statistic(times: list[int], fraction: float) -> None:
    parts = np.array_split(np.array(times, np.int64), 3)
    assert quantile_time(lambda: parts, fraction) == sorted(times)[int(fraction * len(times))]


def test_temporal_quantiles_are_resolved_exactly() -> None:
    times = np.random.default_rng(0).permutation(1000).astype(np.int64)
    split = resolve_split(SplitConfig(kind="temporal", temporal_fraction=0.125), lambda: [times])
    assert (split.validation_time, split.test_time) == (750, 875)
    given_times = resolve_split(SplitConfig(kind="temporal", validation_time=3, test_time=9), lambda: [times])
    assert (given_times.validation_time, given_times.test_time) == (3, 9)


def test_times_that_leave_all_events_on_one_side_are_warned_of_with_those_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    def warnings_of(validation_time: int, test_time: int) -> list[str]:
        caplog.clear()
        split = SplitConfig(kind="temporal", validation_time=validation_time, test_time=test_time)
        resolve_split(split, lambda: [np.array([50, 10]), np.array([], np.int64), np.array([90])])
        return [record.getMessage() for record in caplog.records]

    assert warnings_of(11, 90) == []
    (late,) = warnings_of(11, 91)
    assert "SplitConfig.test_time = 91 " in late and "the first is at 10, the last at 90" in late
    assert [words.split()[0] for words in warnings_of(10, 90)] == ["SplitConfig.validation_time"]
    assert len(warnings_of(91_000, 92_000)) == 2


def test_temporal_without_times_is_refused() -> None:
    with pytest.raises(ValueError, match="needs timestamps"):
        resolve_split(SplitConfig(kind="temporal"), None)


def test_times_in_the_wrong_order_are_both_named() -> None:
    with pytest.raises(ValueError, match=r"SplitConfig\.validation_time must lie before test_time, got \(5, 3\)"):
        SplitConfig(kind="temporal", validation_time=5, test_time=3)
