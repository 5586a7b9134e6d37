"""Means, intervals and paired differences of several methods are those of each one alone."""

import numpy as np
import pytest

from gbla_rec.evaluation.bootstrap import percentile_interval, resampled_means
from gbla_rec.evaluation.summaries import summarise


def test_every_summary_is_that_of_its_own_values():
    generator = np.random.default_rng(0)
    values = {method: {metric: generator.random(70) for metric in ("Recall@5", "NDCG@5")} for method in ("model", "other", "third")}
    del values["third"]["NDCG@5"]
    found = summarise(values, 100)

    def interval(per_user):
        return pytest.approx((per_user.mean(), *percentile_interval(resampled_means(per_user[:, None], 100, seed=0)[:, 0])))

    for method, metrics in values.items():
        assert list(found[method]) == list(metrics)
        for metric, per_user in metrics.items():
            summary = found[method][metric]
            assert (summary["mean"], summary["low"], summary["high"]) == interval(per_user)
            if method == "model":
                assert "first_minus_this" not in summary
            else:
                paired = interval(values["model"][metric] - per_user)
                assert (summary["first_minus_this"], summary["difference_low"], summary["difference_high"]) == paired
