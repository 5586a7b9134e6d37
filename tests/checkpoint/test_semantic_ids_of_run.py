"""A trained run is read with the semantic IDs that it was trained on, and refuses others by name."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gbla_rec.config import RunConfig
from gbla_rec.semantic_ids.features import FEATURES_FILE
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity
from gbla_rec.semantic_ids.table import MANIFEST_FILE, SemanticIdTable, read_manifest

CPU = torch.device("cpu")
pytestmark = pytest.mark.timeout(60)


def remake(ids_dir: Path, change: str) -> None:
    """Semantic IDs of the same dataset and settings, whole by their own manifest."""
    manifest = read_manifest(ids_dir)
    table = SemanticIdTable.load(ids_dir)
    (ids_dir / MANIFEST_FILE).unlink()
    if change == "codes":
        table = dataclasses.replace(table, codes=table.codes.flip(0))
    else:
        np.save(ids_dir / FEATURES_FILE, np.load(ids_dir / FEATURES_FILE)[::-1])
    table.write_files(ids_dir, dataset_hash=manifest["dataset_hash"], config=manifest["config"])


def what_is_told(attempt: Callable[[], object]) -> str | None:
    try:
        attempt()
    except ValueError as error:
        return str(error)
    return None


def use_after(rank: int, world_size: int, config: RunConfig, ids_dir: Path, change: str) -> dict[str, str | None]:
    """Train, remake the semantic IDs, and use the run in each way."""
    from gbla_rec.evaluation.evaluate import evaluate
    from gbla_rec.evaluation.recommend import Recommender
    from gbla_rec.training.trainer import train

    run_dir = train(config, device=CPU)
    remake(ids_dir, change)
    uses: dict[str, Callable[[], object]] = {
        "evaluate": lambda: evaluate(run_dir, device=CPU),
        "recommend": lambda: Recommender.open(run_dir, CPU),
        "resume": lambda: train(config, device=CPU, resume=True),
    }
    told = {name: what_is_told(use) for name, use in uses.items()}
    # as a run of an earlier version
    path = run_dir / "version.json"
    versions = json.loads(path.read_text())
    wanted = versions.pop("semantic_ids_hash")
    path.write_text(json.dumps(versions))
    told["older"] = what_is_told(uses["recommend"])
    return told | {"run_dir": str(run_dir), "wanted": wanted}


def used_after(run_ranks: Any, config: RunConfig, workspace: Path, change: str) -> dict[str, Any]:
    training = dataclasses.replace(config.training, num_steps=1, validate_every=1, save_every=1, validation_users=5)
    return run_ranks(use_after, 1, dataclasses.replace(config, training=training), workspace / "semantic_ids" / "tiny", change)[0]


def reading_features(config: RunConfig) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, item_features=True)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


@pytest.mark.parametrize("change", ["codes", "features"])
def test_other_semantic_ids_of_the_same_settings_are_refused_by_name(
    run_ranks: Any, tiny_run: Any, tiny_workspace: Path, change: str
) -> None:
    config = tiny_run() if change == "codes" else reading_features(tiny_run())
    told = used_after(run_ranks, config, tiny_workspace, change)
    ids_dir = tiny_workspace / "semantic_ids" / "tiny"
    got = SemanticIdsIdentity.of(ids_dir, read_manifest(ids_dir), with_features=change == "features").content
    for use in ("evaluate", "recommend", "resume"):
        message = told[use] or ""
        assert f"the semantic IDs in {ids_dir} must be those that {told['run_dir']} was trained on" in message, use
        assert told["wanted"][:12] in message and got[:12] in message and "gbla-rec tokenize" in message
    assert told["older"] is None


def test_features_that_a_model_does_not_read_may_change(run_ranks: Any, tiny_run: Any, tiny_workspace: Path) -> None:
    told = used_after(run_ranks, tiny_run(), tiny_workspace, "features")
    assert [told[use] for use in ("evaluate", "recommend", "resume")] == [None] * 3
