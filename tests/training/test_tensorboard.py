"""TensorBoard shows what ``metrics.jsonl`` holds, each step once, also of a run that was killed and went on from an earlier checkpoint."""

import json
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from gbla_rec.config import RunConfig, TrainingConfig

CPU = torch.device("cpu")
TRAIN = ("loss", "step_seconds", "tokens_per_second", "data_wait", "learning_rate", "gradient_norm", "tokens")
VALIDATION = ("nll", "num_targets")


def train_until_killed(rank: int, config: RunConfig) -> None:
    """Ends with step 5 in both logs and nothing saved since step 4."""
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training import trainer
    from gbla_rec.training.progress import RunLog

    log = RunLog.validation

    def log_and_die(self: Any, step: int, **values: Any) -> None:
        log(self, step, **values)
        self._board.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    RunLog.validation = log_and_die  # type: ignore[method-assign]
    with process_group() as device:
        trainer.train(config, device=device)


def resume_with_a_peak(rank: int, world_size: int, config: RunConfig) -> Path:
    """Goes on as on a device whose peak is known, so that there is an MFU."""
    from gbla_rec.training import step_window, trainer

    step_window.peak_flops = lambda device: 1e12
    return trainer.train(config, device=CPU, resume=True)


def shown(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values of each tag, as TensorBoard shows them."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def logged(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The same of ``metrics.jsonl``; TensorBoard keeps fp32."""
    values = defaultdict(list)
    for line in map(json.loads, path.read_text().splitlines()):
        step, kind = line.pop("step"), line.pop("kind")
        for name, value in line.items():
            values[f"{kind}/{name}"].append((step, float(np.float32(value))))
    return dict(values)


@pytest.mark.timeout(90)
def test_a_resumed_run_shows_every_step_once_and_as_it_was_logged(
    launch_ranks: Any, run_ranks: Any, tiny_run: Any, tiny_workspace: Path
) -> None:
    config = tiny_run(training=TrainingConfig(num_steps=6, validate_every=5, save_every=4, log_every=1, validation_users=5))
    ((status, output),) = launch_ranks(train_until_killed, 1, config)
    assert status == -signal.SIGKILL, output
    (run_dir,) = (tiny_workspace / "runs" / "tiny").iterdir()
    before = shown(run_dir / "tensorboard")
    assert before == logged(run_dir / "metrics.jsonl")
    # the processor has no peak that is known
    assert set(before) == {f"train/{name}" for name in TRAIN} | {f"validation/{name}" for name in VALIDATION}

    assert run_ranks(resume_with_a_peak, 1, config) == [run_dir]
    after = shown(run_dir / "tensorboard")
    assert after == logged(run_dir / "metrics.jsonl")
    steps = {tag: [step for step, _ in values] for tag, values in after.items()}
    assert steps == {
        **{f"train/{name}": [1, 2, 3, 4, 5, 6] for name in TRAIN},
        **{f"validation/{name}": [5, 6] for name in VALIDATION},
        "train/mfu": [5, 6],
    }
    assert after["train/loss"][:4] == before["train/loss"][:4]
    assert after["train/step_seconds"][4] != before["train/step_seconds"][4]
    # the file of the killed run still has its step 5, which readers of the raw events must drop
    files = sorted((run_dir / "tensorboard").iterdir())
    assert [max(event.step for event in EventFileLoader(str(path)).Load()) for path in files] == [5, 6]
