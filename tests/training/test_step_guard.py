"""A step that is not finite on one rank changes nothing on any; the run stops, names it, and goes on from its checkpoint."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gbla_rec.checkpoint.run_directory import checkpoints
from gbla_rec.config import RunConfig

CPU = torch.device("cpu")
BAD_STEP = 4
KINDS = ("loss", "gradient of the loss", "gradient of a dense weight", "gradient of the rows")


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def whole_state(trainer: Any) -> dict[str, Tensor]:
    """Copies of this rank's tables, their moments, dense weights, and the dense moments and step counts."""
    state = {name: value for name, value in trainer.model.state_dict().items()}
    for table in trainer.model.fused_optimizer.state_dict()["state"].values():
        state |= table
    state |= trainer.optimizer.state_tensors()
    shards: dict[str, Tensor] = {}
    for name, value in state.items():
        parts = [shard.tensor for shard in value.local_shards()] if hasattr(value, "local_shards") else [value]
        shards |= {f"{name}.{i}": part.detach().clone() for i, part in enumerate(parts)}
    return shards


def poison(kind: str, trainer: Any, rank: int) -> dict[str, Tensor]:
    """Make step ``BAD_STEP`` of rank 1 not finite; returns a dict that fills with the state before that step."""
    before: dict[str, Tensor] = {}
    forward, retriever, is_now = trainer._forward, trainer.parts.retriever, [False]
    boundary = retriever.table_boundary
    cut = boundary.forward

    def poisoned_forward(batch: Any) -> tuple[Tensor, Tensor]:
        is_bad = trainer.step + 1 == BAD_STEP
        is_now[0] = is_bad and rank == 1
        if is_bad:
            before.update(whole_state(trainer))
        return forward(batch)

    protect = trainer.guard.protect

    def poisoned_protect(loss: Tensor) -> Tensor:
        if is_now[0] and kind == "loss":
            loss = loss * math.inf - loss * math.inf
        if is_now[0] and kind == "gradient of the loss":
            loss = NanGradient.apply(loss)
        return protect(loss)

    def poisoned_rows(embedded: Any) -> Any:
        rows = cut(embedded)
        if is_now[0] and kind == "gradient of the rows":
            name = next(iter(rows))
            rows = {**rows, name: type(rows[name])(NanGradient.apply(rows[name].values()))}
        return rows

    def poisoned_weight(gradient: Tensor) -> Tensor:
        is_bad = is_now[0] and kind == "gradient of a dense weight"
        return gradient * math.nan if is_bad else gradient

    trainer._forward, trainer.guard.protect, boundary.forward = poisoned_forward, poisoned_protect, poisoned_rows
    next(iter(retriever.history.decoder.parameters())).register_hook(poisoned_weight)
    return before


def stop_at_a_bad_step(rank: int, world_size: int, config: RunConfig) -> list[Any]:
    from gbla_rec import workspace
    from gbla_rec.training import trainer as module

    results = []
    make = module.Trainer.__init__
    for kind in KINDS:
        made: list[tuple[Any, dict[str, Tensor]]] = []

        def make_poisoned(self: Any, *args: Any, kind: str = kind, made: list[Any] = made) -> None:
            make(self, *args)
            made.append((self, poison(kind, self, rank)))

        module.Trainer.__init__ = make_poisoned  # type: ignore[method-assign]
        named = dataclasses.replace(config, name=kind.replace(" ", "-"))
        with pytest.raises(FloatingPointError) as refused:
            module.train(named, device=CPU)
        trainer, before = made[0]
        after = whole_state(trainer)
        assert before.keys() == after.keys() and any("momentum1" in name for name in before)
        changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
        saved = [found.progress.step for found in checkpoints(workspace.latest_run_dir(named.name))]
        results.append((kind, str(refused.value), trainer.step, saved, changed))
    module.Trainer.__init__ = make  # type: ignore[method-assign]
    return results


def resume_and_compare(rank: int, world_size: int, config: RunConfig) -> list[str]:
    """Names of what differs between the resumed run and an undisturbed one at the end."""
    from gbla_rec.training import trainer as module

    states = []
    run = module.Trainer.run

    def run_and_keep(self: Any) -> Path:
        path = run(self)
        states.append(whole_state(self))
        return path

    module.Trainer.run = run_and_keep  # type: ignore[method-assign]
    module.train(dataclasses.replace(config, name="loss"), device=CPU, resume=True)
    module.train(dataclasses.replace(config, name="undisturbed"), device=CPU)
    return [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]


@pytest.mark.timeout(300)
def test_a_bad_step_on_one_rank_changes_nothing_on_any(run_ranks: Any, tiny_run: Any, tiny_workspace: Path) -> None:
    embedding = dataclasses.replace(tiny_run().model.embedding, sharding="row_wise")
    training = dataclasses.replace(tiny_run().training, num_steps=8, save_every=3, validate_every=8, log_every=100)
    config = tiny_run(model=dataclasses.replace(tiny_run().model, embedding=embedding), training=training)
    first, second = run_ranks(stop_at_a_bad_step, 2, config)
    for (kind, message, step, saved, changed), (_, same_message, _, _, also_changed) in zip(first, second, strict=True):
        # the host looks at step 6, before it saves
        assert (step, saved, changed, also_changed) == (6, [3], [], []), kind
        assert message == same_message
        assert f"step {BAD_STEP} is not finite" in message and "rank 1: " in message and "--resume" in message, message
        assert "rank 0: loss" not in message and ("rank 1: loss nan" in message) is (kind == "loss"), message
    (resumable,) = tiny_workspace.glob("runs/loss/*")
    for rank in (0, 1):
        (part,) = tiny_workspace.glob(f"runs/loss/*/bad_batches/step_0000000{BAD_STEP}/rank_0000{rank}.npz")
        batch = np.load(part)
        assert batch["offsets"][-1] == len(batch["items"]) > 0
        assert len(batch["targets"]) == batch["target_offsets"][-1] > 0 and tuple(batch["position"]) == dataclasses.astuple(
            checkpoints(resumable)[0].progress.position
        )
    assert run_ranks(resume_and_compare, 2, config) == [[], []]


@pytest.mark.gpu
def test_the_guard_never_waits_for_the_gpu() -> None:
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.config import OptimizerConfig
    from gbla_rec.data.histories import StreamPosition
    from gbla_rec.models.table_boundary import TableBoundary
    from gbla_rec.training.dense_optimizer import DenseOptimizer
    from gbla_rec.training.step_guard import StepGuard

    with process_group() as device:
        boundary, dense = TableBoundary(), torch.nn.Linear(8, 8, device=device)
        rows = torch.ones(5, 8, device=device, requires_grad=True)
        optimizer = DenseOptimizer(dense.named_parameters(), OptimizerConfig(), 10)
        guard = StepGuard(boundary, dense.parameters(), device)
        optimizer.skip_when(guard.is_bad)
        scales = torch.tensor([1.0, 1.0, math.inf, 1.0], device=device)

        def train(step: int) -> None:
            optimizer.zero_grad()
            embedded = boundary({"item": Rows(rows * 1)})
            guard.protect((dense(embedded["item"].values()) * scales[step]).sum()).backward()
            guard.watch(step, StreamPosition())
            optimizer.step()

        train(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            train(1)
            weight, gradient = dense.weight.detach().clone(), rows.grad.clone()
            train(2)
            train(3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        bad = guard.first_bad_step()
        assert bad is not None and bad.step == 2
        assert torch.equal(dense.weight, weight) and torch.equal(rows.grad, gradient)
        assert guard.first_bad_step() is None


@dataclasses.dataclass
class Rows:
    rows: Tensor

    def values(self) -> Tensor:
        return self.rows
