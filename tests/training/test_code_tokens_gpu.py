"""Code tokens on a CUDA device: tables that nobody looks up, and a deep decoder, train, compiled or not, and are evaluated."""

import dataclasses
import json
from typing import Any

import pytest


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize(("context", "compiled"), [((), False), (("kind",), False), (("kind",), True)])
def test_a_run_on_code_tokens_learns_and_is_evaluated(tiny_run: Any, context: tuple[str, ...], compiled: bool) -> None:
    from gbla_rec.checkpoint.process_group import process_group
    from gbla_rec.evaluation.evaluate import evaluate
    from gbla_rec.training.trainer import train

    config = tiny_run()
    model = config.model
    model = dataclasses.replace(
        model,
        embedding=dataclasses.replace(model.embedding, tokens="codes", context_features=context, dim=16),
        encoder=dataclasses.replace(model.encoder, model_dim=32, pattern="SG"),
        decoder=dataclasses.replace(model.decoder, num_layers=2),
    )
    config = dataclasses.replace(config, model=model, training=dataclasses.replace(config.training, compile=compiled))
    with process_group() as device:
        run_dir = train(config, device=device)
        results = evaluate(run_dir, device=device)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert losses[-1] < losses[0]
    assert results["protocol"]["users"] == 60
