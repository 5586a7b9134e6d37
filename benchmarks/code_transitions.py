"""How much the semantic ID of an item says about the ID of the next one: what a generative retriever can learn at best from codes.

Shapes: ``N`` items, ``C`` code levels, ``P`` pairs of consecutive events. A pair is (the last item before, the next item).
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from gbla_rec.data.dataset import PreparedDataset

Int64Array = NDArray[np.int64]
CONCENTRATION = 300.0
NUM_PERMUTATIONS = 3


@dataclass(frozen=True, eq=False)
class Transitions:
    """Item indices ``(P,)`` int64 before and after."""

    before: Int64Array
    after: Int64Array


def read_transitions(dataset: PreparedDataset) -> tuple[Transitions, Transitions]:
    """Consecutive training events, and (last training event, first validation event) of each user; test events are not read."""
    parts: list[tuple[Int64Array, Int64Array, Int64Array, Int64Array]] = []
    for shard in dataset.iterate_shards():
        ends = shard.offsets[1:]
        first = shard.offsets[:-1] + shard.validation_begin
        training = shard.is_training()
        same_user = np.ones(len(shard.items), dtype=bool)
        same_user[shard.offsets[:-1][np.diff(shard.offsets) > 0]] = False
        inside = np.flatnonzero(training[1:] & training[:-1] & same_user[1:])
        held_out = first[(shard.validation_begin > 0) & (first < ends)]
        parts.append((shard.items[inside], shard.items[inside + 1], shard.items[held_out - 1], shard.items[held_out]))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return Transitions(columns[0], columns[1]), Transitions(columns[2], columns[3])


def prefix_groups(codes: Int64Array) -> list[Int64Array]:
    """For ``l = 0 .. C``: the number of the prefix of ``l`` codes of each item, ``(N,)``; level 0 is one group."""
    groups = [np.zeros(len(codes), dtype=np.int64)]
    for level in range(codes.shape[1]):
        _, inverse = np.unique(np.column_stack([groups[-1], codes[:, level]]), axis=0, return_inverse=True)
        groups.append(inverse.reshape(-1))
    return groups


def shared_fraction(pairs: Transitions, group: Int64Array) -> tuple[float, float]:
    """How often the two items of a pair are in one group, and how often they were by chance (independent draws)."""
    before, after = group[pairs.before], group[pairs.after]
    size = int(group.max()) + 1
    chance = (np.bincount(before, minlength=size) / len(before)) @ (np.bincount(after, minlength=size) / len(after))
    return float((before == after).mean()), float(chance)


def mutual_information(pairs: Transitions, group: Int64Array, seed: int = 0) -> float:
    """Bits between the groups of the two items, less the mean of the same estimate after shuffling one side (its sampling bias)."""
    before, after = group[pairs.before], group[pairs.after]
    rng = np.random.default_rng(seed)
    bias = np.mean([_plug_in(before, rng.permutation(after)) for _ in range(NUM_PERMUTATIONS)])
    return _plug_in(before, after) - float(bias)


def _plug_in(before: Int64Array, after: Int64Array) -> float:
    joint = before * (int(after.max()) + 1) + after
    return _entropy(before) + _entropy(after) - _entropy(joint)


def _entropy(values: Int64Array) -> float:
    _, counts = np.unique(values, return_counts=True)
    probabilities = counts / len(values)
    return float(-(probabilities * np.log2(probabilities)).sum())


def held_out_bits(codes: Int64Array, training: Transitions, held_out: Transitions) -> tuple[float, float]:
    """Cross-entropy in bits of a held-out next item under a bigram model over codes, with the item before and without it.

    Each code of the next item is predicted from its prefix and from ever longer prefixes of the item before; each such
    distribution is counted on training pairs and smoothed towards the shorter context by a Dirichlet prior of weight
    ``CONCENTRATION``, the shortest towards the legal codes alike.

    Args:
        codes: ``(N, C)``, distinct rows, so that bits of tables compare.
        training: pairs to count.
        held_out: pairs to predict.
    """
    groups = prefix_groups(codes)
    with_context = without_context = 0.0
    for parent, child in pairwise(groups):
        _, first = np.unique(child, return_index=True)
        num_children = np.bincount(parent[first])
        probability = 1.0 / num_children[parent[held_out.after]]
        for length, context in enumerate(groups):
            seen = _count(context, child, training, held_out)
            room = _count(context, parent, training, held_out)
            probability = (seen + CONCENTRATION * probability) / (room + CONCENTRATION)
            if length == 0:
                without_context -= float(np.log2(probability).mean())
        with_context -= float(np.log2(probability).mean())
    return with_context, without_context


def _count(context: Int64Array, group: Int64Array, training: Transitions, held_out: Transitions) -> Int64Array:
    """How many training pairs agree with each held-out pair in the context of the first and the group of the second item."""
    size = int(group.max()) + 1
    keys, counts = np.unique(context[training.before] * size + group[training.after], return_counts=True)
    wanted = context[held_out.before] * size + group[held_out.after]
    places = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[places] == wanted, counts[places], 0)
