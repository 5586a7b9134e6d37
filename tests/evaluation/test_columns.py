"""A beam sweep shows what depends on the number of beams, and nothing else."""

from typing import Any

import numpy as np
import pytest

from gbla_rec.config import EvaluationConfig, ModelConfig, RunConfig
from gbla_rec.evaluation.columns import sweep_results
from gbla_rec.evaluation.evaluate import _searches
from gbla_rec.evaluation.rank import RankedUsers, Search
from gbla_rec.evaluation.table import sweep_rows


def ranked(first_item: int) -> RankedUsers:
    users = np.arange(4)
    items = np.tile(np.arange(first_item, first_item + 5), (4, 1))
    return RankedUsers(users, items, np.zeros(4, np.int64), np.arange(5), np.ones(4, np.int64))


def test_a_sweep_shows_the_generative_score_alone_at_the_cutoffs_that_beams_fill() -> None:
    names = {"joint": "run", "generative": "run (generative)", "item": "run (item)"}
    settings = EvaluationConfig(num_beams=5, cutoffs=(2, 5), bootstrap_samples=10)
    rankings = {"joint": ranked(1), "generative": ranked(0), "item": ranked(1)}
    found = sweep_results(rankings, names, 3, settings)  # type: ignore[arg-type]
    assert {method: list(metrics) for method, metrics in found.items()} == {"run (generative)": ["Recall@2", "NDCG@2"]}
    assert found["run (generative)"]["Recall@2"]["mean"] == 1
    assert sweep_results(rankings, names, 1, settings) == {}  # type: ignore[arg-type]
    assert sweep_results({"item": ranked(1)}, {"item": "run"}, 3, settings) == {}
    results = {"scores": names, "methods": {"run": {"Recall@2": {}}}, "beam_sweep": [{"num_beams": 3, "methods": found}]}
    assert sweep_rows(results) == (["run (generative), Recall@2"], [["3", "1.0000 (1.0000-1.0000)"]])


@pytest.mark.parametrize(("objective", "swept"), [("generative", [3, 200]), ("joint", [3, 200]), ("item", [])])
def test_a_sweep_searches_once_for_each_number_of_beams_and_for_the_generative_score_alone(objective: Any, swept: list[int]) -> None:
    evaluation = EvaluationConfig(num_beams=50, both_histories=True, beam_sweep=(3, 50, 200))
    config = RunConfig(name="a", dataset="a", model=ModelConfig(objective=objective), evaluation=evaluation)
    expected = [Search(50, False), Search(50, True), *(Search(beams, False, "generative") for beams in swept)]
    assert _searches(config) == expected
