"""A rank's part of a global batch, cut into micro batches for gradient accumulation."""

# B rows, L history tokens, S targets (docs/shapes.md)

import dataclasses

import numpy as np

from gbla_rec.config import StreamConfig
from gbla_rec.data.histories import HistoryBatch, Int64Array, flat_ranges, sample_costs, split_by_cost


def micro_batches(histories: HistoryBatch, num_micro_batches: int, config: StreamConfig) -> list[HistoryBatch]:
    """Deal the rows to ``num_micro_batches`` parts of similar cost, as the rows of a global batch are dealt to ranks.

    The parts keep the counts and positions of the global batch, so that a loss weighted by ``global_num_targets`` adds up over
    them to that of the whole. Parts may be empty: every rank gets the same number.
    """
    if num_micro_batches == 1:
        return [histories]
    part_of_row = split_by_cost(sample_costs(np.diff(histories.offsets), np.diff(histories.target_offsets), config), num_micro_batches)
    return [_take(histories, np.flatnonzero(part_of_row == part)) for part in range(num_micro_batches)]


def _take(histories: HistoryBatch, rows: Int64Array) -> HistoryBatch:
    """Some of the rows, in the order of ``rows``."""
    tokens, offsets = _flat_rows(histories.offsets, rows)
    targets, target_offsets = _flat_rows(histories.target_offsets, rows)
    seen, seen_offsets = _flat_rows(histories.seen_offsets, rows)
    return dataclasses.replace(
        histories,
        user_rows=histories.user_rows[rows],
        items=histories.items[tokens],
        offsets=offsets,
        context={name: codes[tokens] for name, codes in histories.context.items()},
        targets=histories.targets[targets],
        target_offsets=target_offsets,
        token_keys=histories.token_keys[tokens],
        seen_items=histories.seen_items[seen],
        seen_offsets=seen_offsets,
    )


def _flat_rows(offsets: Int64Array, rows: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Flat indices of the elements of ``rows``, and their new offsets."""
    return flat_ranges(offsets[rows], np.diff(offsets)[rows])
