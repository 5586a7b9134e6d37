"""Micro batches give the dense gradient of the whole batch, on any number of ranks, with one all-reduce a step."""

import dataclasses
import json
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gbla_rec.config import OptimizerConfig, RunConfig, TrainingConfig


def train_and_look(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    """Train; the dense gradients of the first step, the log, and how many buckets DDP reduced."""
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    from gbla_rec.training import trainer
    from gbla_rec.training.gradient_accumulation import data_parallel

    gradients: list[dict[str, torch.Tensor]] = []
    num_reduced = 0
    step = trainer.DenseOptimizer.step

    def keep_and_step(self: Any, closure: None = None) -> None:
        gradients.append({name: parameter.grad.clone() for name, parameter in self.parameters.items()})
        step(self)

    def count(process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        nonlocal num_reduced
        num_reduced += 1
        return default_hooks.allreduce_hook(process_group, bucket)

    run = trainer.Trainer.run

    def count_and_run(self: Any) -> Any:
        if (parallel := data_parallel(self.model)) is not None:
            parallel.register_comm_hook(None, count)
        return run(self)

    trainer.DenseOptimizer.step, trainer.Trainer.run = keep_and_step, count_and_run  # type: ignore[method-assign]
    run_dir = trainer.train(config, device=torch.device("cpu"))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "gradients": gradients[0],
        "num_steps": len(gradients),
        "num_reduced": num_reduced,
        "losses": [line["loss"] for line in lines if line["kind"] == "train"],
        "tokens": [line["tokens"] for line in lines if line["kind"] == "train"],
    }


@pytest.mark.usefixtures("tiny_workspace")
def test_micro_batches_give_the_gradient_of_the_whole_batch(run_ranks: Any, tiny_run: Any) -> None:
    # tables that do not move: each backward steps them, which a later micro batch would see
    frozen = OptimizerConfig(learning_rate=5e-3, warmup_steps=2, table_learning_rate=1e-30)
    base = tiny_run(optimizer=frozen, training=TrainingConfig(num_steps=3, validate_every=3, save_every=2, log_every=1, validation_users=5))
    # more micro batches than some ranks have rows
    split = dataclasses.replace(base, training=dataclasses.replace(base.training, num_micro_batches=3))
    whole = run_ranks(train_and_look, 1, base)[0]
    assert whole["num_reduced"] > 0
    for world_size in (1, 2):
        outcome = run_ranks(train_and_look, world_size, split)[0]
        assert outcome["num_steps"] == 3 and outcome["tokens"] == whole["tokens"]
        assert outcome["num_reduced"] == whole["num_reduced"]
        assert outcome["losses"] == pytest.approx(whole["losses"], rel=2e-5)
        for name, gradient in whole["gradients"].items():
            torch.testing.assert_close(outcome["gradients"][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
