"""Settings that replace a run's own change its joint ranking as they say, and the figures are never taken for the run's own."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gbla_apps import evaluate as app
from gbla_rec.config import EvaluationConfig, ItemHeadConfig, RunConfig
from gbla_rec.evaluation.compare import compare
from gbla_rec.evaluation.comparison_table import comparison_table, comparisons_markdown
from gbla_rec.evaluation.overrides import overridden_settings
from gbla_rec.evaluation.report import report
from gbla_rec.evaluation.run_group import RunGroup

CHANGED = {"joint_beams": {"own": 200, "used": 1000}, "beam_weight": {"own": 1.0, "used": 0.5}}
TEXT = "joint_beams 1000 in place of the run's 200, beam_weight 0.5 in place of the run's 1.0"


def train_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=torch.device("cpu")))


def evaluate_run(rank: int, arguments: list[str]) -> None:
    app.main(arguments)


def joint_run(tiny_run: Any, **settings: Any) -> RunConfig:
    """A run of objective joint; its catalogue has 80 items."""
    base: RunConfig = tiny_run()
    model = dataclasses.replace(base.model, objective="joint", item_head=ItemHeadConfig(num_sampled=20))
    return dataclasses.replace(base, model=model, evaluation=dataclasses.replace(base.evaluation, **settings))


def minus_item(results: dict[str, Any]) -> list[float]:
    """The joint score's figures minus the item-level one's."""
    return [metric["first_minus_this"] for metric in results["methods"]["tiny (item)"].values()]


def saved_run(directory: Path, config: RunConfig) -> Path:
    from gbla_rec.checkpoint.run_directory import create_run

    create_run(directory, config, "dataset", "semantic ids")
    return directory


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(240)
def test_the_options_replace_the_joint_settings_of_a_trained_run(run_ranks: Any, launch_ranks: Any, tiny_run: Any) -> None:
    run_dir = Path(run_ranks(train_run, 1, joint_run(tiny_run, joint_beams=12, beam_weight=1.0))[0])

    def results_with(*options: str) -> tuple[dict[str, Any], str, str]:
        ((status, printed),) = launch_ranks(evaluate_run, 1, ["--run-dir", str(run_dir), *options])
        assert status == 0, printed
        return json.loads((run_dir / "results.json").read_text()), (run_dir / "results.md").read_text(), printed

    # every item is a candidate, and the log-probability has no say: the item-level ranking
    changed, markdown, printed = results_with("--joint-beams", "100", "--beam-weight", "0")
    assert not any(minus_item(changed))
    assert (changed["protocol"]["joint_beams"], changed["protocol"]["beam_weight"]) == (100, 0)
    assert changed["protocol"]["overrides"] == {"joint_beams": {"own": 12, "used": 100}, "beam_weight": {"own": 1.0, "used": 0.0}}
    said = "joint_beams 100 in place of the run's 12, beam_weight 0.0 in place of the run's 1.0"
    assert said in markdown and said in " ".join(printed.split())
    assert "item-kNN" in printed and "…" not in printed, "five methods are printed whole"

    own, markdown, _ = results_with("--num-beams", "10")
    assert any(minus_item(own)), "12 beams do not hold every item"
    assert (own["protocol"]["joint_beams"], own["protocol"]["beam_weight"]) == (12, 1), "the run's own settings were left as they are"
    assert own["protocol"]["overrides"] == {}, "a sweep changes none of the main figures"
    assert "joint ranking of 12 beams with weight 1;" in markdown and "in place of" not in markdown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--joint-beams", "0"), r"--joint-beams must be at least 1, got 0; leave it out"),
        (("--beam-weight", "-0.5"), r"--beam-weight must be finite and not negative, got -0.5; 0 ranks by"),
        (("--beam-weight", "nan"), r"--beam-weight must be finite and not negative, got nan"),
        (("--beam-weight", "inf"), r"--beam-weight must be finite and not negative, got inf"),
        (
            ("--joint-beams", "9"),
            r"--joint-beams must be at least the run's EvaluationConfig.num_beams, got 9 for .* of 10; give 10 or more",
        ),
    ],
)
def test_a_value_out_of_bounds_is_refused_by_its_option(tiny_run: Any, tmp_path: Path, options: tuple[str, str], message: str) -> None:
    run_dir = saved_run(tmp_path / "run", joint_run(tiny_run))
    with pytest.raises(ValueError, match=message):
        app.main(["--run-dir", str(run_dir), *options])


@pytest.mark.parametrize(("option", "value"), [("--joint-beams", "100"), ("--beam-weight", "0.5")])
def test_a_run_without_a_joint_score_refuses_its_settings(tiny_run: Any, tmp_path: Path, option: str, value: str) -> None:
    run_dir = saved_run(tmp_path / "run", tiny_run())
    message = (
        f"{option} must be given for a run of objective 'joint' only, got {value} for {run_dir} of objective 'generative'; leave it out"
    )
    with pytest.raises(ValueError, match=message):
        app.main(["--run-dir", str(run_dir), option, value])


def test_settings_that_only_add_figures_are_no_overrides() -> None:
    own = EvaluationConfig()
    adding = dataclasses.replace(own, both_histories=True, beam_sweep=(3, 9), history_edges=(5,), cold_edges=(2,), bootstrap_samples=9)
    assert overridden_settings(own, adding) == {}
    other = dataclasses.replace(adding, cutoffs=(5, 10), exclude_history=True)
    assert overridden_settings(own, other) == {
        "cutoffs": {"own": [5, 10, 50], "used": [5, 10]},
        "exclude_history": {"own": False, "used": True},
    }


def write_joint(evaluated_runs: Any, name: str, seed: int, used: dict[str, Any], overrides: dict[str, Any]) -> None:
    path = evaluated_runs.write(name, seed, np.linspace(0, 1, 40)) / "results.json"
    results = json.loads(path.read_text()) | {"scores": {"joint": name}}
    results["protocol"] |= {**used, "overrides": overrides}
    results["config"]["evaluation"] = {"num_beams": 50, **used}
    path.write_text(json.dumps(results))


def test_comparisons_and_reports_name_the_overrides(evaluated_runs: Any) -> None:
    write_joint(evaluated_runs, "own", 0, {"joint_beams": 200, "beam_weight": 1.0}, {})
    write_joint(evaluated_runs, "changed", 0, {"joint_beams": 1000, "beam_weight": 0.5}, CHANGED)
    found = compare(RunGroup.find(["changed"]), RunGroup.find(["own"]))
    title = f"changed (joint) with {TEXT} minus own (joint): films"
    text = comparisons_markdown([found])
    assert "\nthe groups differ in: evaluation.joint_beams (1000, 200), evaluation.beam_weight (0.5, 1.0)\n" in text
    assert title in text and title in str(comparison_table(found).title)
    assert f"| changed | 0 | 1000 ({TEXT}) | step_00000010 |" in text and "| own | 0 | 200 | step_00000010 |" in text
    page = report(["own", "changed"]).markdown()
    assert f"| changed with overrides | 0 | SGG x 2, bidirectional | 1000 ({TEXT}) |" in page
    assert "| own | 0 | SGG x 2, bidirectional | 200 |" in page


def test_seeds_of_a_run_evaluated_with_unlike_settings_are_no_group(evaluated_runs: Any) -> None:
    write_joint(evaluated_runs, "a", 0, {"joint_beams": 200, "beam_weight": 1.0}, {})
    write_joint(evaluated_runs, "a", 1, {"joint_beams": 1000, "beam_weight": 0.5}, CHANGED)
    with pytest.raises(ValueError, match=r"differ in evaluation.joint_beams \(200, 1000\), evaluation.beam_weight \(1.0, 0.5\);"):
        RunGroup.find(["a"])
    page = report(["a"]).markdown()
    assert "| a | 0 |" in page and "| a with overrides | 1 |" in page
