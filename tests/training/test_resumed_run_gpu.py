"""Train, save, resume, evaluate on one CUDA device under NCCL: the curve of the run that was not stopped, and an evaluation."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

STOPPED_AT, NUM_STEPS = 4, 8
BF16_TOLERANCE = 1e-2
"""The kernels add in the same order, but the gradients of softmax attention and of tables do not promise to."""


@pytest.mark.gpu
@pytest.mark.timeout(240)
@pytest.mark.parametrize("options", [{}, {"async_save": True, "compile": True}], ids=["plain", "async_save_compiled"])
def test_a_resumed_run_sees_the_curve_of_an_undisturbed_one_and_is_evaluated_alike(
    tiny_run: Any, tiny_workspace: Path, options: dict[str, bool]
) -> None:
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.evaluation.evaluate import evaluate
    from gbla_rec.training.trainer import train

    config = tiny_run()
    training = dataclasses.replace(config.training, num_steps=NUM_STEPS, validate_every=4, keep_last=10, **options)
    config = dataclasses.replace(config, name="whole", training=training)
    with process_group() as device:
        whole = train(config, device=device)
        stopped = dataclasses.replace(config, name="stopped")
        run_dir = tiny_workspace / "runs" / "stopped" / whole.name
        shutil.copytree(whole, run_dir)
        (run_dir / "config.json").write_text((whole / "config.json").read_text().replace('"whole"', '"stopped"'))
        for later in range(STOPPED_AT + 1, NUM_STEPS + 1):
            shutil.rmtree(run_dir / "checkpoints" / f"step_{later:08d}", ignore_errors=True)
        assert train(stopped, device=device, resume=True) == run_dir
        results = [evaluate(path, device=device) for path in (whole, run_dir)]
    expected, again = (
        {(line["kind"], line["step"]): line.get("loss", line.get("nll")) for line in map(json.loads, lines)}
        for lines in ((path / "metrics.jsonl").read_text().splitlines() for path in (whole, run_dir))
    )
    assert ("train", NUM_STEPS) in again and again == pytest.approx(expected, rel=BF16_TOLERANCE)
    assert (run_dir / "checkpoints" / f"step_{NUM_STEPS:08d}").is_dir()
    # not the metrics: eight steps teach little, and a user more or less among sixty is within the tolerance of the weights
    assert results[0]["protocol"] == results[1]["protocol"]
    assert list(results[1]["methods"])[1:] == list(results[0]["methods"])[1:] == ["most-popular", "item-kNN"]
