"""Even codes: no code beyond its capacity, no one better off elsewhere, distinct codes while there are enough."""

import itertools

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from gbla_rec.config import SemanticIdConfig
from gbla_rec.semantic_ids.balance import assign_with_capacity, balanced_centroids, capacity_of, distinct_last_codes
from gbla_rec.semantic_ids.quantizer import ResidualQuantizer


def skewed(num_items: int, seed: int = 0) -> NDArray[np.float32]:
    """Two thirds of the items lie in one tight crowd."""
    rng = np.random.default_rng(seed)
    crowd = rng.random(num_items) < 0.66
    return np.where(crowd[:, None], 0.05, 1.0).astype(np.float32) * rng.standard_normal((num_items, 6)).astype(np.float32)


def squared(vectors: NDArray[np.float32], centroids: NDArray[np.float32]) -> NDArray[np.float64]:
    difference = vectors[:, None, :].astype(np.float64) - centroids[None]
    return np.asarray(np.square(difference).sum(axis=2))


@given(num_items=st.integers(1, 60), num_centroids=st.integers(1, 12), slack=st.integers(0, 3), num_equal=st.integers(0, 60))
@example(num_items=60, num_centroids=7, slack=0, num_equal=60)
@example(num_items=12, num_centroids=12, slack=0, num_equal=0)
def test_no_code_exceeds_its_capacity_and_the_assignment_is_stable(num_items: int, num_centroids: int, slack: int, num_equal: int) -> None:
    vectors, centroids = skewed(num_items), skewed(num_centroids, seed=1)
    vectors[:num_equal] = vectors[0]
    capacity = -(-num_items // num_centroids) + slack
    codes = assign_with_capacity(vectors, centroids, capacity)
    counts = np.bincount(codes, minlength=num_centroids)
    assert len(counts) == num_centroids and counts.max() <= capacity
    distances = squared(vectors, centroids)
    own = distances[np.arange(num_items), codes]
    for centroid in range(num_centroids):
        refused = np.flatnonzero(distances[:, centroid] < own - 1e-6)
        if len(refused):
            assert counts[centroid] == capacity
            assert own[codes == centroid].max() <= distances[refused, centroid].min() + 1e-6


def test_with_room_everyone_gets_the_nearest_and_without_room_it_is_refused() -> None:
    vectors, centroids = skewed(50), skewed(5, seed=1)
    assert np.array_equal(assign_with_capacity(vectors, centroids, 50), squared(vectors, centroids).argmin(axis=1))
    with pytest.raises(ValueError, match=r"capacity must be at least 50 / 5 .* got 9"):
        assign_with_capacity(vectors, centroids, 9)


def test_moving_the_centroids_lowers_the_cost_at_the_same_capacity() -> None:
    vectors, first = skewed(300), skewed(300)[:10]
    moved = balanced_centroids(vectors, first, 30)
    cost = [squared(vectors, centroids)[np.arange(300), assign_with_capacity(vectors, centroids, 30)].sum() for centroids in (first, moved)]
    assert cost[1] < 0.9 * cost[0]


@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), num_levels=st.integers(0, 2))
@example(sizes=[6], num_levels=0)
def test_codes_under_a_prefix_are_distinct_and_the_cheapest_such(sizes: list[int], num_levels: int) -> None:
    numbers = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    # two codes of which neither alone tells prefixes apart, one, or none: then all are alike
    prefixes = np.stack([numbers // 2, numbers % 2], axis=1) if num_levels == 2 else numbers[:, None][:, :num_levels]
    sizes, numbers = (sizes, numbers) if num_levels else ([sum(sizes)], np.zeros_like(numbers))
    vectors, centroids = skewed(len(prefixes)), skewed(4, seed=1)
    codes = distinct_last_codes(vectors, centroids, prefixes)
    distances = squared(vectors, centroids)
    for prefix, size in enumerate(sizes):
        group = np.flatnonzero(numbers == prefix)
        # a prefix of more items than codes uses each code before it uses one twice
        assert len(set(codes[group])) == min(size, 4) and np.bincount(codes[group]).max() == -(-size // 4)
        if size <= 4:
            cheapest = min(distances[group, list(choice)].sum() for choice in itertools.permutations(range(4), size))
            assert distances[group, codes[group]].sum() == pytest.approx(cheapest, abs=1e-6)


@pytest.mark.parametrize("balance", [1.0, 1.5, None])
def test_each_level_of_a_balanced_table_keeps_to_its_capacity(balance: float | None) -> None:
    vectors = skewed(500)
    quantizers = [ResidualQuantizer.fit(vectors, num_levels=3, width=16, iterations=8, seed=0, balance=balance) for _ in range(2)]
    codes = [quantizer.encode_together(vectors, balance=balance, distinct_last_code=False) for quantizer in quantizers]
    assert np.array_equal(codes[0], codes[1])
    largest = [int(np.bincount(level).max()) for level in codes[0].T]
    if balance is None:
        # the crowd shares a code: the capacity is what spreads it
        assert largest[0] > 64 and np.array_equal(codes[0], quantizers[0].encode(vectors))
    else:
        assert max(largest) <= capacity_of(500, 16, balance) <= 500 / 16 * balance + 1


def test_settings_without_meaning_are_refused() -> None:
    for changes, message in (
        ({"balance": 0.9}, "balance must be finite and at least 1, or None, got 0.9"),
        ({"behaviour_weight": -1.0}, "behaviour_weight must be finite and at least 0, got -1.0"),
        ({"text_columns": ("title", "title")}, "text_columns must name each column once"),
    ):
        with pytest.raises(ValueError, match=message):
            SemanticIdConfig(**changes)  # type: ignore[arg-type]
