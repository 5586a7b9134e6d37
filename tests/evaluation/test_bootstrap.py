"""Bootstrap intervals: reproducible, of the right width, paired where the users are the same."""

import numpy as np
import pytest

from gbla_rec.evaluation import bootstrap
from gbla_rec.evaluation.bootstrap import percentile_interval, resampled_means, resampled_seed_weights


def bootstrap_interval(values, num_samples, seed):
    return values.mean(), *percentile_interval(resampled_means(values[:, None], num_samples, seed)[:, 0])


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


def test_columns_share_their_users_so_that_pairing_sees_a_small_steady_difference():
    hard = np.random.default_rng(0).random(400)
    better = hard + 0.01 + 0.001 * np.random.default_rng(1).standard_normal(400)
    draws = resampled_means(np.stack([better, hard], axis=1), 500, seed=0)
    low, high = percentile_interval(draws[:, 0] - draws[:, 1])
    assert 0.009 < low < high < 0.011
    # unpaired intervals overlap
    assert percentile_interval(draws[:, 0])[0] < percentile_interval(draws[:, 1])[1]


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_weights_of_seeds_vary_as_the_mean_of_new_seeds_would(num_seeds):
    values = np.random.default_rng(3).standard_normal(num_seeds)
    weights = resampled_seed_weights(num_seeds, 100_000, np.random.default_rng(0))
    assert weights.sum(axis=1) == pytest.approx(1.0)
    means = weights @ values
    assert means.mean() == pytest.approx(values.mean(), abs=0.01)
    assert means.var() == pytest.approx(values.var(ddof=1) / num_seeds, rel=0.03)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one user"):
        resampled_means(np.zeros((0, 2)), 10, seed=0)
    with pytest.raises(ValueError, match="user 1"):
        resampled_means(np.array([[0.0, 0.0], [0.0, np.nan]]), 10, seed=0)
    with pytest.raises(ValueError, match="num_samples"):
        resampled_means(np.zeros((3, 1)), 0, seed=0)
    with pytest.raises(ValueError, match="at least 2"):
        resampled_seed_weights(1, 10, np.random.default_rng(0))
