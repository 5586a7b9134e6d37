"""Metrics against the definitions written out one user at a time, and against scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score

from gbla_rec.evaluation.metrics import ndcg_at_k, recall_at_k

NUM_ITEMS = 12


@st.composite
def rankings(draw):
    """Rankings (U, R) with -1 padding, and one to six targets per user, repeats among them."""
    num_users, width = draw(st.integers(0, 5)), draw(st.integers(1, NUM_ITEMS))
    rows, targets = [], []
    for _ in range(num_users):
        order = draw(st.permutations(range(NUM_ITEMS)))[: draw(st.integers(0, width))]
        rows.append(order + [-1] * (width - len(order)))
        targets.append(draw(st.lists(st.integers(0, NUM_ITEMS - 1), min_size=1, max_size=6)))
    return np.array(rows, np.int64).reshape(num_users, width), targets, draw(st.integers(1, width))


def flat(targets):
    offsets = np.cumsum([0, *map(len, targets)]).astype(np.int64)
    return np.array([item for row in targets for item in row], np.int64), offsets


def naive_recall(ranked, targets, k):
    return len({item for item in ranked[:k] if item in targets}) / len(set(targets))


def naive_ndcg(ranked, targets, k):
    gain = sum(1 / math.log2(place + 2) for place, item in enumerate(ranked[:k]) if item in targets)
    return gain / sum(1 / math.log2(place + 2) for place in range(min(k, len(set(targets)))))


@given(rankings())
def test_recall_and_ndcg_equal_their_definitions(case):
    ranked, targets, k = case
    users = list(zip(ranked.tolist(), targets, strict=True))
    np.testing.assert_allclose(recall_at_k(ranked, *flat(targets), k), [naive_recall(row, wanted, k) for row, wanted in users])
    np.testing.assert_allclose(ndcg_at_k(ranked, *flat(targets), k), [naive_ndcg(row, wanted, k) for row, wanted in users])


def test_ndcg_equals_scikit_learn_on_full_rankings():
    generator = np.random.default_rng(0)
    scores = np.stack([generator.permutation(NUM_ITEMS) for _ in range(40)]).astype(np.float64)
    relevant = generator.random((40, NUM_ITEMS)) < 0.3
    relevant[:, 0] = True
    targets = flat([np.flatnonzero(row).tolist() for row in relevant])
    for k in (1, 3, NUM_ITEMS):
        expected = [ndcg_score(relevant[None, u], scores[None, u], k=k) for u in range(40)]
        np.testing.assert_allclose(ndcg_at_k(np.argsort(-scores, axis=1), *targets, k), expected)


def test_the_ideal_ranking_scores_one_and_padding_never_hits():
    targets = flat([[3, 1, 3], [0]])
    assert recall_at_k(np.array([[3, 1], [0, -1]]), *targets, 2).tolist() == [1.0, 1.0]
    assert ndcg_at_k(np.array([[1, 3], [0, -1]]), *targets, 2).tolist() == [1.0, 1.0]
    assert recall_at_k(np.full((2, 2), -1), *targets, 2).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("ranked", "targets", "offsets", "k", "message"),
    [
        ([[1, 2]], [1], [0, 1], 3, "k must lie in"),
        ([[1, 2]], [1], [0, 1], 0, "k must lie in"),
        ([[1, 2], [4, 4]], [1, 1], [0, 1, 2], 1, "user 1 does"),
        ([[1, 2], [3, 4]], [1], [0, 1, 1], 1, "user 1 has none"),
        ([[1, 2]], [1], [0, 1, 1], 1, "target_offsets must have shape"),
        ([[1, 2]], [1, 2], [0, 1], 1, "from 0 to the 2 targets"),
        ([[-2, 1]], [1], [0, 1], 1, "smaller value"),
        ([[0, 1]], [-1], [0, 1], 1, "smaller value"),
    ],
)
def test_bad_input_is_refused(ranked, targets, offsets, k, message):
    for metric in (recall_at_k, ndcg_at_k):
        with pytest.raises(ValueError, match=message):
            metric(np.array(ranked), np.array(targets), np.array(offsets), k)
