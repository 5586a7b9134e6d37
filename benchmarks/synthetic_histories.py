"""Histories of one length without a dataset: batches for the step benchmark."""

from collections.abc import Iterator

import numpy as np

from gbla_rec.data.histories import HistoryBatch

SKEW = 3
"""Items are drawn as ``num_items * u ** SKEW``: popular ones come often, most of a batch's items once."""


def synthetic_histories(
    length: int, tokens: int, targets_per_history: int, num_items: int, *, rank: int, world_size: int
) -> Iterator[HistoryBatch]:
    """Endless batches of ``tokens // length`` histories on this rank.

    Args:
        length: events of every history.
        tokens: budget of one rank.
        targets_per_history: events to predict after each.
        num_items: size of the catalogue.
        rank: seeds the items.
        world_size: ranks that have as much each; the global counts say so.
    """
    random = np.random.default_rng(rank)
    num_rows = max(tokens // length, 1)
    num_targets = num_rows * targets_per_history
    while True:
        drawn = (num_items * random.random(num_rows * length + num_targets) ** SKEW).astype(np.int64)
        yield HistoryBatch.of_lengths(
            drawn[: num_rows * length],
            [length] * num_rows,
            targets=drawn[num_rows * length :],
            target_lengths=[targets_per_history] * num_rows,
            token_keys=random.integers(-(2**63), 2**63 - 1, num_rows * length),
            global_num_targets=world_size * num_targets,
            global_num_tokens=world_size * num_rows * length,
        )
