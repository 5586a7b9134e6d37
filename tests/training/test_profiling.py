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
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = [event.get("name", "") for event in events if event.get("cat") == "user_annotation"]
    assert set(names) >= PARTS
    assert sum(name.startswith("## optimizer") for name in names) == 3


def resume_at_three(rank: int, world_size: int, config: RunConfig) -> None:
    from gbla_rec.training.trainer import train

    def asking_for(steps: str | None) -> RunConfig:
        return dataclasses.replace(config, training=dataclasses.replace(config.training, profile_steps=steps))

    train(asking_for(None), device=torch.device("cpu"))
    for steps in ("2:1", "2:3", "4", "2:3"):
        print(f"asked for {steps}", flush=True)
        train(asking_for(steps), device=torch.device("cpu"), resume_step=3)


@pytest.mark.usefixtures("tiny_workspace")
def test_steps_that_a_resumed_run_has_passed_are_warned_of_once(run_ranks: Any, tiny_run: Any, tmp_path: Path) -> None:
    training = dataclasses.replace(tiny_run().training, num_steps=5, save_every=3, keep_last=9)
    run_ranks(resume_at_three, 2, dataclasses.replace(tiny_run(), training=training))
    first, second = ((tmp_path / "ranks-0" / f"{rank}.output").read_text() for rank in range(2))
    start, of_one, of_some, of_none, again = (part.splitlines() for part in first.split("asked for "))
    asks = "warning: --training.profile-steps asks for"
    found = [[line for line in part if "profile-steps" in line] for part in (start, of_one, of_some, of_none, again)]
    assert found[0] == found[3] == []
    assert found[1] == [f"{asks} step 2, and the run is resumed at step 3: not recorded (give later ones)"]
    assert found[2] == [f"{asks} steps 2 to 3, and the run is resumed at step 3: not recorded (give later ones)"]
    assert len(found[4]) == 1 and "steps 2 to 3" in found[4][0] and found[4][0].endswith("/trace_2-4.json.gz)")
    assert "profile-steps" not in second


@pytest.mark.parametrize("wrong", ["0", "3:0", "3-5", "x", "3:"])
def test_a_wrong_range_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"TrainingConfig.profile_steps must be 'first' or 'first:count', both at least 1"):
        TrainingConfig(profile_steps=wrong)
    assert TrainingConfig(profile_steps="7").profiled_steps == range(7, 8)
