"""A profile holds the steps that were asked for, with the parts of a step by name."""

import dataclasses
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec.config import RunConfig, TrainingConfig

PARTS = {"tables", "input", "encoder.S", "encoder.G", "encoder.ffn", "decoder", "loss"}


def train_quietly(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=torch.device("cpu")))


@pytest.mark.usefixtures("tiny_workspace")
def test_a_profile_holds_the_parts_of_the_steps_asked_for(run_ranks: Any, tiny_run: Any) -> None:
    config = tiny_run()
    # across a save and a validation, which interrupt the pipeline
    training = dataclasses.replace(config.training, profile_steps="2:3", num_steps=5)
    run_dir = Path(run_ranks(train_quietly, 2, dataclasses.replace(config, training=training))[0])
    (path,) = run_dir.glob("trace*")
    assert path.name == "trace_2-4.json.gz"
    assert set(annotations(path)) >= PARTS
    assert num_steps(path) == 3


def annotations(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event.get("name", "") for event in events if event.get("cat") == "user_annotation"]


def num_steps(path: Path) -> int:
    return sum(name.startswith("## optimizer") for name in annotations(path))


def resume_at_three(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    def asking_for(steps: str | None) -> RunConfig:
        return dataclasses.replace(config, training=dataclasses.replace(config.training, profile_steps=steps))

    run_dir = train(asking_for("1:3"), device=torch.device("cpu"))
    for steps in ("2:1", "2:3", "4", "1:3", "1:5"):
        print(f"asked for {steps}", flush=True)
        train(asking_for(steps), device=torch.device("cpu"), resume_step=3)
    return str(run_dir)


@pytest.mark.usefixtures("tiny_workspace")
def test_steps_that_a_resumed_run_has_passed_are_warned_of_once_and_their_trace_is_kept(
    run_ranks: Any, tiny_run: Any, tmp_path: Path
) -> None:
    training = dataclasses.replace(tiny_run().training, num_steps=5, save_every=3, keep_last=9)
    run_dir = Path(run_ranks(resume_at_three, 2, dataclasses.replace(tiny_run(), training=training))[0])
    first, second = ((tmp_path / "ranks-0" / f"{rank}.output").read_text() for rank in range(2))
    warnings = [[line for line in part.splitlines() if "profile-steps" in line] for part in first.split("asked for ")]
    asks = "warning: --training.profile-steps asks for"
    at_three = "and the run is resumed at step 3: not recorded"
    assert warnings == [
        [],
        [f"{asks} step 2, {at_three} (give later ones)"],
        [f"{asks} steps 2 to 3, {at_three} (give later ones)"],
        [],
        [f"{asks} steps 1 to 3, {at_three} (their trace of before is {run_dir}/trace_1-3.json.gz)"],
        [f"{asks} steps 1 to 3, {at_three} (give later ones)"],
    ]
    assert "profile-steps" not in second
    # named for the steps that are in it, whatever was asked for
    assert {path.name: num_steps(path) for path in run_dir.glob("trace*")} == {
        "trace_1-3.json.gz": 3,
        "trace_4-4.json.gz": 1,
        "trace_4-5.json.gz": 2,
    }


@pytest.mark.usefixtures("tiny_workspace")
def test_a_resumed_run_leaves_the_trace_of_the_steps_before_as_it_is(run_ranks: Any, tiny_run: Any) -> None:
    training = dataclasses.replace(tiny_run().training, num_steps=5, save_every=3, keep_last=9, profile_steps="2:3")
    run_dir = Path(run_ranks(train_and_resume_at_three, 1, dataclasses.replace(tiny_run(), training=training))[0])
    assert {path.name: num_steps(path) for path in run_dir.glob("trace*")} == {"trace_2-4.json.gz": 3, "trace_4-4.json.gz": 1}


def train_and_resume_at_three(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    train(config, device=torch.device("cpu"))
    return str(train(config, device=torch.device("cpu"), resume_step=3))


@pytest.mark.parametrize("wrong", ["0", "3:0", "3-5", "x", "3:"])
def test_a_wrong_range_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"TrainingConfig.profile_steps must be 'first' or 'first:count', both at least 1"):
        TrainingConfig(profile_steps=wrong)
    assert TrainingConfig(profile_steps="7").profiled_steps == range(7, 8)
