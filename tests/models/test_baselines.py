"""The baselines against their definitions written out one user and one item pair at a time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.models import baselines
from gbla_rec.models.baselines import ItemKNN, MostPopular

NUM_ITEMS = 9
histories = st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=12), max_size=7)


def flat(rows):
    return np.cumsum([0, *map(len, rows)]).astype(np.int64), np.array([item for row in rows for item in row], np.int64)


def shards(rows):
    """The same users in two shards."""
    return [flat(rows[: len(rows) // 2]), flat(rows[len(rows) // 2 :])]


def rank(baseline, rows, num_results, exclude_seen):
    offsets, items = flat(rows)
    return baseline.rank(items, offsets, num_results, exclude_seen=exclude_seen).tolist()


def padded(items, num_results):
    return (items + [-1] * num_results)[:num_results]


@given(histories, histories, st.integers(1, NUM_ITEMS + 2), st.booleans())
def test_most_popular_equals_sorting_the_catalogue_for_each_user(train, seen, num_results, exclude_seen):
    counts = [sum(row.count(item) for row in train) for item in range(NUM_ITEMS)]
    expected = []
    for row in seen:
        candidates = [item for item in range(NUM_ITEMS) if not (exclude_seen and item in row)]
        expected.append(padded(sorted(candidates, key=lambda item: (-counts[item], item)), num_results))
    assert rank(MostPopular(shards(train), NUM_ITEMS), seen, num_results, exclude_seen) == expected


@given(
    histories,
    histories,
    st.booleans(),
    st.sampled_from([1.0, 0.5]),
    st.sampled_from([1, 3, 100]),
    st.sampled_from([2, 1000]),
    st.sampled_from([1, 10**7]),
)
def test_item_knn_equals_its_definition(train, seen, exclude_seen, decay, num_neighbours, max_length, block):
    users_of = [{u for u, row in enumerate(train) if item in row[-max_length:]} for item in range(NUM_ITEMS)]

    def cosine(i, j):
        both = len(users_of[i] & users_of[j])
        return both / math.sqrt(len(users_of[i]) * len(users_of[j])) if both else 0.0

    def neighbours(i):
        others = [j for j in range(NUM_ITEMS) if j != i and cosine(i, j) > 0]
        return sorted(others, key=lambda j: (-np.float32(cosine(i, j)), j))[:num_neighbours]

    expected = []
    for row in seen:
        ages = {item: age for age, item in reversed(list(enumerate(reversed(row[-max_length:]))))}
        scores = {}
        for item in sorted(ages):
            for j in neighbours(item):
                scores[j] = scores.get(j, 0.0) + decay ** ages[item] * cosine(item, j)
        candidates = [j for j in scores if not (exclude_seen and j in row)]
        expected.append(padded(sorted(candidates, key=lambda j: (-np.float32(scores[j]), j)), 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "MAX_PRODUCTS_AT_ONCE", block)
        knn = ItemKNN(shards(train), NUM_ITEMS, num_neighbours=num_neighbours, recency_decay=decay, max_history_length=max_length)
        assert rank(knn, seen, 5, exclude_seen) == expected


def test_a_million_items_need_no_dense_matrix():
    generator = np.random.default_rng(0)
    offsets = np.arange(0, 20_001, 20, dtype=np.int64)
    items = generator.integers(0, 1_000_000, 20_000)
    ranked = ItemKNN([(offsets, items)], 1_000_000).rank(items[:200], offsets[:11], 10, exclude_seen=True)
    # nobody else shares an item, so neighbours are the own history, which is excluded
    assert ranked.shape == (10, 10)
    assert MostPopular([(offsets, items)], 1_000_000).rank(items[:200], offsets[:11], 10, exclude_seen=True).min() >= 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match=r"item indices in \[0, 9\), got 0 to 9"):
        MostPopular([flat([[0, 9]])], NUM_ITEMS)
    with pytest.raises(ValueError, match="offsets of seen_items"):
        MostPopular([], NUM_ITEMS).rank(np.array([1]), np.array([0, 2]), 3, exclude_seen=False)
    with pytest.raises(ValueError, match="recency_decay"):
        ItemKNN([], NUM_ITEMS, recency_decay=0.0)
    with pytest.raises(ValueError, match="num_neighbours"):
        ItemKNN([], NUM_ITEMS, num_neighbours=0)
