"""Bootstrap intervals: reproducible, of the right width, paired where the users are the same."""

import numpy as np
import pytest

from gbla_rec.evaluation import bootstrap
from gbla_rec.evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval


def test_the_same_seed_gives_the_same_interval():
    values = np.random.default_rng(0).random(300)
    assert bootstrap_interval(values, 200, seed=1) == bootstrap_interval(values, 200, seed=1)
    assert bootstrap_interval(values, 200, seed=1) != bootstrap_interval(values, 200, seed=2)


def test_the_interval_is_that_of_the_normal_approximation():
    values = (np.random.default_rng(0).random(5_000) < 0.07).astype(np.float64)
    mean, low, high = bootstrap_interval(values, 2_000, seed=0)
    half_width = 1.96 * values.std() / np.sqrt(len(values))
    assert mean == values.mean()
    assert low == pytest.approx(mean - half_width, abs=0.1 * half_width)
    assert high == pytest.approx(mean + half_width, abs=0.1 * half_width)


def test_blocks_of_draws_change_nothing(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap_interval(values, 101, seed=0)
    monkeypatch.setattr(bootstrap, "MAX_DRAWS_AT_ONCE", 500)
    assert bootstrap_interval(values, 101, seed=0) == whole


def test_pairing_sees_a_small_steady_difference():
    hard = np.random.default_rng(0).random(400)
    better = hard + 0.01 + 0.001 * np.random.default_rng(1).standard_normal(400)
    mean, low, high = paired_bootstrap_interval(better, hard, 500, seed=0)
    assert 0.009 < low < mean < high < 0.011
    # unpaired intervals overlap
    assert bootstrap_interval(better, 500, seed=0)[1] < bootstrap_interval(hard, 500, seed=0)[2]


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one user"):
        bootstrap_interval(np.zeros(0), 10, seed=0)
    with pytest.raises(ValueError, match="user 1"):
        bootstrap_interval(np.array([0.0, np.nan]), 10, seed=0)
    with pytest.raises(ValueError, match="num_samples"):
        bootstrap_interval(np.zeros(3), 0, seed=0)
    with pytest.raises(ValueError, match="same users"):
        paired_bootstrap_interval(np.zeros(3), np.zeros(4), 10, seed=0)
