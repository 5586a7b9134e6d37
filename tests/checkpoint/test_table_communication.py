"""What ranks exchange for the tables: the bytes that a plan foretells, and bf16 as nothing but rounded rows and gradients."""

import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch

from gbla_rec.config import OptimizerConfig, RunConfig

CPU = torch.device("cpu")


def with_embedding(config: RunConfig, **changes: Any) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, **changes)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


def exchanged_bytes(config: RunConfig) -> tuple[Counter[torch.dtype], int]:
    """Bytes by dtype that this rank sends in one forward and backward, and its tokens."""
    import torch.distributed as dist

    from gbla_rec.checkpoint.run_parts import RunParts

    parts = RunParts.open(config, CPU)
    _, batch = next(iter(parts.evaluation_batches("validation", 400)))
    sent: Counter[torch.dtype] = Counter()
    send = dist.all_to_all_single

    def count_and_send(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sent[input.dtype] += input.nbytes
        return send(output, input, *args, **kwargs)

    dist.all_to_all_single = count_and_send
    loss, _ = parts.model(batch)
    loss.backward()
    dist.all_to_all_single = send
    return sent, batch.items.numel()


@pytest.mark.usefixtures("tiny_workspace")
def test_an_exchange_has_the_bytes_that_the_plan_foretells(run_ranks: Any, tiny_run: Any) -> None:
    from gbla_rec.checkpoint.cluster import Cluster
    from gbla_rec.checkpoint.cluster_plan import plan_cluster
    from gbla_rec.checkpoint.known_catalogue import known_catalogue

    kinds = [("fp32", "row_wise"), ("fp32", "table_wise"), ("fp32", "column_wise"), ("bf16", "row_wise"), ("bf16", "table_wise")]
    configs = [with_embedding(tiny_run(), communication=kind, sharding=sharding, dim=256) for kind, sharding in kinds]
    # each rank also looks up the 80 items of the catalogue
    configs.append(dataclasses.replace(configs[0], model=dataclasses.replace(configs[0].model, objective="joint")))

    def measure(rank: int, world_size: int) -> list[tuple[Counter[torch.dtype], int]]:
        return [exchanged_bytes(config) for config in configs]

    cluster = Cluster(device_type="cpu", world_size=2, ranks_per_node=2, device_memory=0, host_memory=16 * 10**9)
    for config, first, second in zip(configs, *run_ranks(measure, 2), strict=True):
        tokens = first[1] + second[1]
        stream = dataclasses.replace(config.stream, tokens_per_batch=tokens)
        exchange = plan_cluster(dataclasses.replace(config, stream=stream), cluster, known_catalogue(config)[0]).exchange
        dtype = torch.float32 if config.model.embedding.communication == "fp32" else torch.bfloat16
        sent = first[0] + second[0]
        # forward and backward
        lookups = tokens + 2 * 80 * config.model.has_item_head
        assert sent[dtype] == 2 * exchange.rows == 2 * lookups * 3 * 256 * dtype.itemsize
        assert set(sent) == {dtype, torch.int64}
        # the lengths of rows come on top of the ids
        assert 0 <= sent[torch.int64] - exchange.ids < 0.2 * exchange.ids


def training_losses(config: RunConfig, *, rounded: bool = False) -> list[float]:
    """Losses of a run; ``rounded`` puts the rounding of bf16 communication into an fp32 run, by hand."""
    import json

    from gbla_rec.models import history_input
    from gbla_rec.training import trainer

    class Rounding(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, rows: torch.Tensor) -> torch.Tensor:
            return rows.bfloat16().float()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.bfloat16().float()

    forward = history_input.HistoryInput.forward
    if rounded:

        def rounded_forward(self: Any, rows: list[torch.Tensor], *others: Any) -> torch.Tensor:
            return forward(self, [Rounding.apply(values) for values in rows], *others)

        history_input.HistoryInput.forward = rounded_forward  # type: ignore[method-assign, assignment]
    try:
        run_dir = trainer.train(config, device=CPU)
    finally:
        history_input.HistoryInput.forward = forward  # type: ignore[method-assign]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.usefixtures("tiny_workspace")
def test_bf16_communication_rounds_rows_and_their_gradients_and_nothing_else(run_ranks: Any, tiny_run: Any) -> None:
    # a large eps: Adagrad would otherwise hide the size of a gradient
    optimizer = OptimizerConfig(learning_rate=5e-3, warmup_steps=2, table_learning_rate=1.0, table_eps=1.0)
    config = with_embedding(tiny_run(optimizer=optimizer), sharding="row_wise")

    def run(rank: int, world_size: int) -> list[list[float]]:
        bf16 = with_embedding(config, communication="bf16")
        return [training_losses(config), training_losses(config, rounded=True), training_losses(bf16)]

    fp32, by_hand, bf16 = run_ranks(run, 2)[0]
    assert bf16 == by_hand != fp32
    # a row moves by 2^-9 of itself at most, and the loss by less than a like part
    assert bf16 == pytest.approx(fp32, rel=2**-9)
