"""The beams that tables show are those of the search behind the score, and none where there was no search."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from gbla_rec.config import EvaluationConfig, ItemHeadConfig
from gbla_rec.evaluation.compare import compare
from gbla_rec.evaluation.comparison_table import comparisons_markdown
from gbla_rec.evaluation.evaluate import beam_settings
from gbla_rec.evaluation.report import report
from gbla_rec.evaluation.run_group import RunGroup
from gbla_rec.evaluation.searched_beams import searched_beams

SCORES = {"joint": "own", "generative": "own (generative)", "item": "own (item)"}


@pytest.mark.parametrize(("num_beams", "joint_beams", "searched"), [(50, 200, 200), (300, 200, 300)])
def test_each_score_has_the_beams_of_its_own_search(tiny_run: Any, num_beams: int, joint_beams: int, searched: int) -> None:
    model = dataclasses.replace(tiny_run().model, objective="joint", item_head=ItemHeadConfig(num_sampled=20))
    settings = EvaluationConfig(num_beams=num_beams, joint_beams=joint_beams, beam_weight=0.6)
    protocol = beam_settings(tiny_run(model=model, evaluation=settings))
    assert protocol == {"num_beams": num_beams, "joint_beams": searched, "beam_weight": 0.6}
    assert beam_settings(tiny_run(evaluation=settings)) == {"num_beams": num_beams}
    older = {"num_beams": num_beams}
    config = {"evaluation": {"joint_beams": joint_beams}}
    for found in (protocol, older):
        results = {"scores": SCORES, "protocol": found, "config": config}
        assert searched_beams(results) == searched_beams(results, "own") == searched_beams(results, "joint") == searched
        assert searched_beams(results, "own (generative)") == num_beams
        assert searched_beams(results, "own (item)") is None and searched_beams(results, "item-kNN") is None


def test_comparisons_and_reports_show_the_beams_of_the_main_score(evaluated_runs: Any) -> None:
    for name, score in (("both", "joint"), ("plain", "generative"), ("items", "item")):
        path = evaluated_runs.write(name, 0, np.linspace(0, 1, 40)) / "results.json"
        results = json.loads(path.read_text()) | {"scores": {score: name}}
        results["protocol"] |= {"joint_beams": 200} if score == "joint" else {}
        path.write_text(json.dumps(results))
    wanted = {"both": "200", "plain": "50", "items": "-"}
    groups = {name: RunGroup.find([name]) for name in wanted}
    page = report(list(wanted)).markdown()
    for name, beams in wanted.items():
        text = comparisons_markdown([compare(groups[name], groups["plain"])])
        assert f"| {name} | 0 | {beams} | step_00000010 |" in text
        assert f"| {name} | 0 | SGG x 2, bidirectional | {beams} | step_00000010 |" in page
