"""Values of single users, side by side for the seeds of a group."""

import numpy as np

from gbla_rec.evaluation.per_user import values_by_seed


def test_seeds_stand_side_by_side_for_the_metrics_that_all_have() -> None:
    first = {"Recall@5": np.array([0.0, 1.0, 0.5]), "Recall@10": np.ones(3)}
    second = {"NDCG@5": np.zeros(3), "Recall@5": np.array([1.0, 0.0, 0.25])}
    found = values_by_seed([first, second])
    assert list(found) == ["Recall@5"]
    np.testing.assert_array_equal(found["Recall@5"], [[0.0, 1.0], [1.0, 0.0], [0.5, 0.25]])
