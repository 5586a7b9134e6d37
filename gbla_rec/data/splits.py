"""Which events of a history are for training, validation and test.

Histories are jagged: ``E`` events of ``U`` users, ``offsets (U + 1,)``. Events ``[0, validation_begin)`` of a history
are for training, ``[validation_begin, test_begin)`` are the validation targets, ``[test_begin, n)`` the test targets.
"""

import logging
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import SplitConfig
from gbla_rec.data.schema import SplitInfo

Int64Array = NDArray[np.int64]
HISTOGRAM_BITS = 16
logger = logging.getLogger(__name__)


def tie_group_starts(offsets: Int64Array, timestamps: Int64Array | None) -> Int64Array:
    """Index of the first event of each event's tie group (same user, same timestamp).

    Args:
        offsets: ``(U + 1,)`` int64.
        timestamps: ``(E,)`` int64, not decreasing within a user; ``None`` means that no events are tied.

    Returns:
        ``(E,)`` int64 indices into the flat events.
    """
    index = np.arange(offsets[-1], dtype=np.int64)
    if timestamps is None or len(index) == 0:
        return index
    is_first = np.empty(len(index), dtype=bool)
    is_first[0] = True
    np.not_equal(timestamps[1:], timestamps[:-1], out=is_first[1:])
    starts = offsets[:-1]
    is_first[starts[starts < len(index)]] = True
    return np.maximum.accumulate(np.where(is_first, index, 0))


def split_points(offsets: Int64Array, timestamps: Int64Array | None, split: SplitInfo) -> tuple[Int64Array, Int64Array]:
    """Cut each history into training, validation and test.

    ``leave_last`` with ``num_targets = k``: test begins at ``n - k``, validation at ``n - 2 k``; with
    ``ties="together"`` both move back to the first event of their tie group. A history shorter than ``2 k + 1``, or one
    whose validation memory would be empty, has no targets: all its events are for training.

    Args:
        offsets: ``(U + 1,)`` int64.
        timestamps: ``(E,)`` int64, not decreasing within a user, or ``None``.
        split: the split; a temporal one with its times resolved.

    Returns:
        ``validation_begin`` and ``test_begin``, each ``(U,)`` int64, relative to the history's first event.
    """
    starts, lengths = offsets[:-1], np.diff(offsets)
    if split.kind == "temporal":
        assert timestamps is not None and split.validation_time is not None and split.test_time is not None
        return _count_before(offsets, timestamps, split.validation_time), _count_before(offsets, timestamps, split.test_time)
    has_targets = lengths >= 2 * split.num_targets + 1
    test_begin = np.where(has_targets, lengths - split.num_targets, lengths)
    validation_begin = np.where(has_targets, lengths - 2 * split.num_targets, lengths)
    if split.ties == "together" and timestamps is not None:
        group_starts = tie_group_starts(offsets, timestamps)
        for cut in (test_begin, validation_begin):
            cut[has_targets] = group_starts[(starts + cut)[has_targets]] - starts[has_targets]
    only_training = validation_begin == 0
    return np.where(only_training, lengths, validation_begin), np.where(only_training, lengths, test_begin)


def resolve_split(config: SplitConfig, timestamps: Callable[[], Iterable[Int64Array]] | None) -> SplitInfo:
    """Fix the times of a temporal split; they are exact order statistics of all timestamps.

    The time of quantile ``q`` is the timestamp at place ``floor(q * E)`` of the ``E`` sorted timestamps.

    Args:
        config: the split that was asked for.
        timestamps: makes a fresh pass over all timestamps in pieces; ``None`` if the log has no timestamps.

    Raises:
        ValueError: if a temporal split has no timestamps to work on, or both quantiles fall on one timestamp.
    """
    validation_time, test_time = config.validation_time, config.test_time
    if config.kind == "temporal":
        if timestamps is None:
            raise ValueError("SplitConfig.kind='temporal' needs timestamps, but the log has none; use 'leave_last'")
        if validation_time is None or test_time is None:
            fractions = (1 - 2 * config.temporal_fraction, 1 - config.temporal_fraction)
            validation_time, test_time = (quantile_time(timestamps, fraction) for fraction in fractions)
            if validation_time >= test_time:
                raise ValueError(
                    f"SplitConfig.temporal_fraction={config.temporal_fraction}: validation and test would both begin at "
                    f"{test_time} because so many events share that timestamp; give validation_time and test_time"
                )
        else:
            _warn_of_times_outside(timestamps, validation_time, test_time)
    return SplitInfo(config.kind, config.ties, config.num_targets, validation_time, test_time)


def _warn_of_times_outside(timestamps: Callable[[], Iterable[Int64Array]], validation_time: int, test_time: int) -> None:
    """A time in another unit than the log's leaves no event on one of its sides."""
    ends = [(int(part.min()), int(part.max())) for part in timestamps() if len(part)]
    if not ends:
        return
    first, last = min(low for low, _ in ends), max(high for _, high in ends)
    for name, time in (("validation_time", validation_time), ("test_time", test_time)):
        if not first < time <= last:
            logger.warning(
                "SplitConfig.%s = %d has all events of the log on one side: the first is at %d, the last at %d; is it in their unit?",
                name,
                time,
                first,
                last,
            )


def quantile_time(timestamps: Callable[[], Iterable[Int64Array]], fraction: float) -> int:
    """The timestamp at place ``floor(fraction * E)``, found with histograms in bounded memory.

    Four passes fix 16 bits each; nothing is sorted and nothing but the histogram is held.
    """
    total = sum(len(part) for part in timestamps())
    rank = min(int(fraction * total), total - 1)
    prefix = 0
    for shift in range(64 - HISTOGRAM_BITS, -1, -HISTOGRAM_BITS):
        histogram = np.zeros(1 << HISTOGRAM_BITS, dtype=np.int64)
        for part in timestamps():
            # the flipped sign bit makes unsigned order the order of int64
            keys = part.view(np.uint64) ^ np.uint64(1 << 63)
            if shift + HISTOGRAM_BITS < 64:
                keys = keys[keys >> np.uint64(shift + HISTOGRAM_BITS) == np.uint64(prefix)]
            digits = (keys >> np.uint64(shift)) & np.uint64((1 << HISTOGRAM_BITS) - 1)
            histogram += np.bincount(digits.astype(np.int64), minlength=1 << HISTOGRAM_BITS)
        cumulative = np.cumsum(histogram)
        digit = int(np.searchsorted(cumulative, rank, side="right"))
        rank -= int(cumulative[digit - 1]) if digit else 0
        prefix = prefix << HISTOGRAM_BITS | digit
    return prefix - (1 << 63)


def _count_before(offsets: Int64Array, timestamps: Int64Array, time: int) -> Int64Array:
    """Events of each user strictly before ``time``: ``(U,)`` int64."""
    cumulative: Int64Array = np.concatenate([np.zeros(1, np.int64), np.cumsum(timestamps < time, dtype=np.int64)])
    counts: Int64Array = cumulative[offsets[1:]] - cumulative[offsets[:-1]]
    return counts
