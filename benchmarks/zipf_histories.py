"""Histories of Zipf lengths without a dataset, and how ranks share a global batch of them: for weak scaling of the training step."""

# B rows, L history tokens (docs/shapes.md)

import itertools
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from synthetic_histories import SKEW

from gbla_rec.config import StreamConfig
from gbla_rec.data.histories import HistoryBatch, Int64Array, sample_costs, split_by_cost

Balance = Literal["cost", "tokens", "none"]
SHORTEST_OF_LONGEST = 1 / 512
"""The shortest history, as a part of the longest."""
GOLDEN = (5**0.5 - 1) / 2


def zipf_lengths(longest: int) -> Iterator[int]:
    """Endless lengths: as many of at least ``T`` as is proportional to ``1 / T``, from ``longest / 512`` to ``longest``.

    Not random: multiples of the golden ratio, modulo 1, fill the distribution evenly, so that any stretch has its share of
    long histories and runs on different numbers of ranks compare after few steps.
    """
    shortest = max(longest * SHORTEST_OF_LONGEST, 1.0)
    return (min(int(shortest / (1 - index * GOLDEN % 1)), longest) for index in itertools.count())


def zipf_batches(
    longest: int,
    tokens: int,
    targets_per_history: int,
    num_items: int,
    costs: StreamConfig,
    balance: Balance,
    *,
    rank: int,
    world_size: int,
) -> Iterator[HistoryBatch]:
    """Endless parts of this rank in global batches of at most ``world_size * tokens`` events, filled as training fills them.

    Args:
        longest: events of the longest history.
        tokens: budget of each rank.
        targets_per_history: events to predict after each history.
        num_items: size of the catalogue.
        costs: of samples, counted from the model.
        balance: ``cost``: histories are dealt by their cost, as training does; ``tokens``: by their events; ``none``: in turn.
        rank: this rank; seeds the items too.
        world_size: number of ranks.
    """
    random = np.random.default_rng(rank)
    for whole in global_batches(zipf_lengths(longest), world_size * tokens):
        mine = whole[_ranks(whole, targets_per_history, costs, balance, world_size) == rank]
        num_tokens, num_rows = int(mine.sum()), len(mine)
        num_targets = num_rows * targets_per_history
        drawn = (num_items * random.random(num_tokens + num_targets) ** SKEW).astype(np.int64)
        yield HistoryBatch.of_lengths(
            drawn[:num_tokens],
            mine,
            targets=drawn[num_tokens:],
            target_lengths=[targets_per_history] * num_rows,
            token_keys=random.integers(-(2**63), 2**63 - 1, num_tokens),
            global_num_targets=len(whole) * targets_per_history,
            global_num_tokens=int(whole.sum()),
        )


def global_batches(lengths: Iterable[int], budget: int) -> Iterator[Int64Array]:
    """Lengths in their order, ``(B,)`` at a time: as many as fit into ``budget`` tokens, one at least."""
    taken: list[int] = []
    room = budget
    for length in lengths:
        if taken and length > room:
            yield np.array(taken, np.int64)
            taken, room = [], budget
        taken.append(length)
        room -= length


def _ranks(lengths: Int64Array, targets_per_history: int, costs: StreamConfig, balance: Balance, world_size: int) -> NDArray[np.int64]:
    """``(B,)`` rank of each history."""
    if balance == "none":
        return np.arange(len(lengths)) % world_size
    if balance == "tokens":
        return split_by_cost(lengths.astype(np.float64), world_size)
    return split_by_cost(sample_costs(lengths, np.full(len(lengths), targets_per_history), costs), world_size)
