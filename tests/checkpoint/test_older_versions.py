"""What an earlier version left in a workspace is still read: settings that it did not know have the values that it worked by."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec.checkpoint.run_directory import read_config
from gbla_rec.config import to_json
from gbla_rec.recipes import recipe

YOUNGER = {
    "semantic_ids": ("text_columns", "behaviour_weight", "balance", "distinct_last_code"),
    "model.embedding": ("id_dropout", "event_dropout", "token_dropout", "item_features", "tokens"),
    "model.decoder": ("num_layers",),
    "model": ("objective", "item_head"),
    "stream": ("cuts", "exclude_evaluated"),
    "evaluation": ("both_histories", "beam_sweep", "history_edges", "cold_edges", "joint_beams", "beam_weight"),
}
"""Settings by section that older runs and semantic IDs do not have."""


def without_younger(config: dict[str, Any]) -> dict[str, Any]:
    for section, names in YOUNGER.items():
        part = config
        for name in section.split("."):
            part = part[name]
        for name in names:
            del part[name]
    return config


def opened_config(rank: int, world_size: int, run_dir: str) -> str:
    from gbla_rec.checkpoint.run_parts import RunParts

    return to_json(RunParts.open(read_config(Path(run_dir)), torch.device("cpu")).config)


def test_a_run_and_semantic_ids_without_younger_settings_are_opened(
    run_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(without_younger(json.loads(to_json(tiny_run())))))
    manifest_path = tiny_workspace / "semantic_ids" / "tiny" / "semantic_ids.json"
    manifest = json.loads(manifest_path.read_text())
    for name in YOUNGER["semantic_ids"]:
        del manifest["config"][name]
    manifest_path.write_text(json.dumps(manifest))
    assert run_ranks(opened_config, 1, str(tmp_path)) == [to_json(tiny_run())]


def test_a_config_that_cannot_be_read_is_named_with_the_way_to_its_version(tmp_path: Path) -> None:
    whole = to_json(recipe("own_data"))
    for text, reason in ((whole.replace('"seed"', '"seeed"'), r"RunConfig must have only the fields .*'seeed'"), (whole[:-9], "delimiter")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=rf"{tmp_path}/config.json cannot be read: .*{reason}.*version.json beside it"):
            read_config(tmp_path)
