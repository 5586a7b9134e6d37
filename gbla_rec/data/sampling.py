"""Where the histories of a shard are cut into training samples, and in which order the samples come."""

import numpy as np
from numpy.typing import NDArray

from gbla_rec.config import StreamConfig
from gbla_rec.data.histories import Samples
from gbla_rec.data.keyed_random import keyed_uint64, keyed_uniform
from gbla_rec.data.shard_files import HistoryShard
from gbla_rec.data.splits import tie_group_starts

Int64Array = NDArray[np.int64]
CUT_KEY, ORDER_KEY = 1, 2


def training_samples(shard: HistoryShard, config: StreamConfig, *, seed: int, epoch: int, keep_ties: bool) -> Samples:
    """Cut every history of a shard and shuffle the samples.

    A history with ``n`` training events gets ``min(max_cuts_per_history, ceil(n / targets_per_cut))`` cuts, one uniform
    in each of as many equal strata of ``[min_history_length, n)``; ``cuts="newest"`` takes one, before the newest
    ``targets_per_cut`` events. With ``keep_ties`` a cut moves back to the start of its tie group, or forward to the end if too few
    events are left to read. Equal cuts are taken once. With ``exclude_evaluated`` a history with later events gets no cut.

    Args:
        shard: the histories; only events before ``validation_begin`` are used.
        config: the cuts and lengths.
        seed: seed of the run.
        epoch: number of the epoch.
        keep_ties: whether events of one timestamp stay on one side of a cut.
    """
    users, cuts = _draw_cuts(shard, config, seed, epoch)
    if keep_ties:
        users, cuts = _move_off_ties(shard, config, users, cuts)
    is_new = np.ones(len(cuts), dtype=bool)
    is_new[1:] = (users[1:] != users[:-1]) | (cuts[1:] != cuts[:-1])
    users, cuts = users[is_new], cuts[is_new]
    user_rows = users + shard.first_user
    order = np.argsort(keyed_uint64(seed, epoch, ORDER_KEY, user_rows, cuts), kind="stable")
    users, cuts = users[order], cuts[order]
    begin = np.maximum(cuts - config.max_history_length, 0)
    end = np.minimum(cuts + config.targets_per_cut, shard.validation_begin[users])
    return Samples(user_rows[order], begin, cuts, end, shard.offsets[users] + begin)


def _draw_cuts(shard: HistoryShard, config: StreamConfig, seed: int, epoch: int) -> tuple[Int64Array, Int64Array]:
    num_events = shard.validation_begin
    if config.exclude_evaluated:
        num_events = np.where(num_events < np.diff(shard.offsets), 0, num_events)
    span = num_events - config.min_history_length
    if config.cuts == "newest":
        users = np.flatnonzero(span > 0).astype(np.int64)
        return users, np.maximum(num_events[users] - config.targets_per_cut, config.min_history_length)
    num_cuts = np.minimum(config.max_cuts_per_history, -(-num_events // config.targets_per_cut))
    num_cuts = np.where(span > 0, num_cuts, 0)
    users = np.repeat(np.arange(len(num_events), dtype=np.int64), num_cuts)
    stratum = np.arange(len(users), dtype=np.int64) - np.repeat(np.cumsum(num_cuts) - num_cuts, num_cuts)
    uniform = keyed_uniform(seed, epoch, CUT_KEY, users + shard.first_user, stratum)
    inside = np.floor((stratum + uniform) * span[users] / num_cuts[users]).astype(np.int64)
    return users, config.min_history_length + np.minimum(inside, span[users] - 1)


def _move_off_ties(shard: HistoryShard, config: StreamConfig, users: Int64Array, cuts: Int64Array) -> tuple[Int64Array, Int64Array]:
    group_starts = tie_group_starts(shard.offsets, shard.timestamps)
    first = shard.offsets[users]
    starts = group_starts[first + cuts]
    boundaries = np.append(np.flatnonzero(group_starts == np.arange(len(group_starts))), len(group_starts))
    ends = boundaries[np.searchsorted(boundaries, starts, side="right")]
    moved = np.where(starts - first >= config.min_history_length, starts, ends) - first
    is_possible = moved < shard.validation_begin[users]
    return users[is_possible], moved[is_possible]
