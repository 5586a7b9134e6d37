"""Tables in host memory, on a CUDA device: the curve of tables in device memory."""

import dataclasses
import json
from typing import Any

import pytest


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_workspace")
def test_placement_and_bf16_communication_keep_the_curve(tiny_run: Any) -> None:
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.training.trainer import train

    losses: dict[str, list[float]] = {}
    with process_group() as device:
        assert device.type == "cuda"
        for placement, communication in (("hbm", "fp32"), ("uvm_caching", "fp32"), ("uvm", "fp32"), ("hbm", "bf16")):
            config = tiny_run()
            embedding = dataclasses.replace(
                config.model.embedding, dim=16, placement=placement, communication=communication, cache_load_factor=0.5
            )
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))
            run_dir = train(config, device=device)
            kernel = {"hbm": "fused", "uvm_caching": "fused_uvm_caching", "uvm": "fused_uvm"}[placement]
            assert f", {kernel}:" in (run_dir / "plan.txt").read_text()
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            losses[f"{placement} {communication}"] = [line["loss"] for line in lines if line["kind"] == "train"]
    reference = losses.pop("hbm fp32")
    for name, curve in losses.items():
        # bf16 autocast: 2^-8 of rounding, which a different order of sums may turn over
        assert curve == pytest.approx(reference, rel=2**-8), name


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_workspace")
def test_a_loaded_checkpoint_replaces_the_rows_in_the_cache(tiny_run: Any) -> None:
    import torch

    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.checkpoint.run_directory import checkpoints
    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.checkpoint.storage import load_checkpoint
    from gbla_rec.training.trainer import train

    config = tiny_run()
    embedding = dataclasses.replace(config.model.embedding, dim=16, placement="uvm_caching", cache_load_factor=1.0)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))
    with process_group() as device:
        first, *_, last = checkpoints(train(config, device=device))
        parts = RunParts.open(config, device)
        parts.model.eval()

        @torch.no_grad()
        def nll_of(checkpoint: Any) -> float:
            load_checkpoint(checkpoint, parts.model, None)
            _, batch = next(iter(parts.evaluation_batches("validation", 400)))
            return float(parts.retriever(batch)[1].double().sum())

        before = nll_of(first)
        assert nll_of(last) != before
        assert nll_of(first) == pytest.approx(before, rel=1e-6)


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_workspace")
def test_a_save_in_the_background_holds_what_the_ordinary_one_holds(tiny_run: Any) -> None:
    import torch

    from gbla_rec.checkpoint.background_save import HostCopy
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.checkpoint.storage import checkpoint_state

    with process_group() as device:
        model = RunParts.open(tiny_run(), device).model
        state, copied = checkpoint_state(model, {}), HostCopy()(checkpoint_state(model, {}))
        assert state["model"].keys() == copied["model"].keys()
        for name, value in state["model"].items():
            shards, others = ([value], [copied["model"][name]])
            if hasattr(value, "local_shards"):
                shards, others = ([shard.tensor for shard in tensor.local_shards()] for tensor in (value, copied["model"][name]))
            for shard, other in zip(shards, others, strict=True):
                assert shard.is_cuda and other.is_pinned() and torch.equal(shard.cpu(), other), name
