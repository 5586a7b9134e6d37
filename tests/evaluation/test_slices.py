"""Slices divide the users, edges follow the data, and the rarest target decides."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.config import EvaluationConfig
from gbla_rec.evaluation.slices import MAX_SLICES, MIN_SLICE_USERS, logarithmic_edges, rarest_target_events, slices_at
from gbla_rec.evaluation.summaries import summarise, summarise_slices

values = st.lists(st.integers(0, 70), min_size=1, max_size=60).map(lambda drawn: np.array(drawn, np.int64))
edges = st.sets(st.integers(1, 70), max_size=5).map(sorted)


@given(values, edges)
def test_slices_divide_the_users_and_their_weighted_mean_is_the_whole(lengths, edges):
    slices = slices_at(lengths, edges)
    assert np.array_equal(sum(part.members.astype(int) for part in slices), np.ones(len(lengths)))
    for part in slices:
        assert all(part.low <= length and (part.high is None or length <= part.high) for length in lengths[part.members])
    scores = {"model": {"Recall@10": np.random.default_rng(len(lengths)).random(len(lengths))}}
    parts = summarise_slices(scores, slices, 10)
    assert sum(part["users"] for part in parts) == len(lengths)
    assert [part["methods"] == {} for part in parts] == [part["users"] == 0 for part in parts]
    weighted = sum(part["users"] * part["methods"]["model"]["Recall@10"]["mean"] for part in parts if part["users"]) / len(lengths)
    assert weighted == pytest.approx(summarise(scores, 10)["model"]["Recall@10"]["mean"])


def test_labels_say_the_bounds():
    assert [part.label for part in slices_at(np.zeros(1, np.int64), (1, 6))] == ["0", "1-5", "6+"]
    assert [part.label for part in slices_at(np.zeros(1, np.int64), ())] == ["0+"]


@given(st.integers(1, 5_000), st.floats(0.5, 6.0), st.integers(0, 9))
def test_logarithmic_edges_give_few_slices_of_enough_users(num_users, spread, seed):
    lengths = np.random.default_rng(seed).lognormal(2.0, spread, num_users).clip(1, 131_072).astype(np.int64)
    edges = logarithmic_edges(lengths)
    slices = slices_at(lengths, edges)
    assert len(slices) <= MAX_SLICES
    assert all(edge & (edge - 1) == 0 for edge in edges), "powers of two"
    assert len(slices) == 1 or all(part.members.sum() >= MIN_SLICE_USERS for part in slices)


def test_edges_follow_the_lengths():
    lengths = np.repeat([3, 5, 9, 20, 40, 300], [100, 100, 100, 100, 49, 30])
    assert logarithmic_edges(lengths) == (4, 8, 16, 32), "the few longest are joined"
    assert logarithmic_edges(np.repeat([3, 5], [10, 100])) == (), "too few short ones to stand alone"
    assert len(logarithmic_edges(2 ** np.repeat(np.arange(17), 60))) < MAX_SLICES, "wider factors where lengths span more"


def test_the_rarest_target_counts():
    counts = np.array([7, 0, 3])
    assert rarest_target_events(np.array([0, 2, 0, 1]), np.array([0, 2, 3, 4]), counts).tolist() == [3, 7, 0]
    assert rarest_target_events(np.zeros(0, np.int64), np.zeros(1, np.int64), counts).tolist() == []


def test_edges_must_rise():
    for wrong in ((0,), (3, 3), (5, 2)):
        with pytest.raises(ValueError, match="rise from above 0"):
            slices_at(np.zeros(1, np.int64), wrong)
        for field in ("cold_edges", "history_edges", "beam_sweep"):
            with pytest.raises(ValueError, match=f"{field} must rise from above 0"):
                EvaluationConfig(**{field: wrong})
