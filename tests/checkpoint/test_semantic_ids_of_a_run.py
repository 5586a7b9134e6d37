"""A run belongs to the semantic IDs that it was trained on: made anew with the same settings, their codes mean other items."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec import workspace
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.evaluation.evaluate import evaluate
from gbla_rec.evaluation.recommend import Recommender
from gbla_rec.semantic_ids.table import SemanticIdTable, read_manifest
from gbla_rec.training.trainer import train

CPU = torch.device("cpu")


def in_a_group(action: Callable[[], Any]) -> Any:
    with process_group():
        return action()


@pytest.mark.usefixtures("tiny_workspace")
def test_a_run_refuses_semantic_ids_that_were_made_anew(tiny_run: Any) -> None:
    config = tiny_run()
    run_dir = in_a_group(lambda: train(config, device=CPU))
    directory = workspace.semantic_ids_dir(config.dataset)
    table, manifest = SemanticIdTable.load(directory), read_manifest(directory)
    kept = directory.rename(directory.with_name("kept"))
    anew = dataclasses.replace(table, codes=table.codes.roll(1, dims=0))
    anew.save(directory, dataset_hash=manifest["dataset_hash"], config=manifest["config"])
    uses: list[Callable[[], object]] = [
        lambda: evaluate(run_dir, device=CPU),
        lambda: Recommender.open(run_dir, CPU),
        lambda: train(config, device=CPU, resume=True),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=r"was trained on semantic IDs with hash .* made anew.*restore the earlier directory"):
            in_a_group(use)
    assert not (run_dir / "results.json").exists()
    directory.rename(directory.with_name("anew"))
    kept.rename(directory)
    for use in uses:
        in_a_group(use)


@pytest.mark.usefixtures("tiny_workspace")
def test_a_run_that_does_not_record_its_semantic_ids_is_evaluated(tiny_run: Any) -> None:
    run_dir: Path = in_a_group(lambda: train(tiny_run(), device=CPU))
    version = run_dir / "version.json"
    recorded = json.loads(version.read_text())
    assert recorded.pop("semantic_ids_hash")
    version.write_text(json.dumps(recorded))
    assert in_a_group(lambda: evaluate(run_dir, device=CPU))["checkpoint"]
