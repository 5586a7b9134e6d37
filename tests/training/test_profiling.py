"""A profile holds the steps that were asked for, with the parts of a step by name."""

import dataclasses
import gzip
import json
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
    from pathlib import Path

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


@pytest.mark.parametrize("wrong", ["0", "3:0", "3-5", "x", "3:"])
def test_a_wrong_range_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match=r"TrainingConfig.profile_steps must be 'first' or 'first:count', both at least 1"):
        TrainingConfig(profile_steps=wrong)
    assert TrainingConfig(profile_steps="7").profiled_steps == range(7, 8)
