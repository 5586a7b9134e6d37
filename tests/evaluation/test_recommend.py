"""Recommendations come from the checkpoint that was tested, and name every item."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from gbla_rec.checkpoint.run_directory import RESULTS, Progress, checkpoint_path, write_progress
from gbla_rec.data.histories import StreamPosition
from gbla_rec.evaluation.recommend import Recommender, _chosen_checkpoint


def test_the_evaluated_checkpoint_goes_before_the_lowest_nll(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step, nll in ((100, 1.0), (200, 2.0)):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        progress = Progress(step=step, position=StreamPosition(), sequence_hash="", world_size=1, validation_nll=nll)
        write_progress(checkpoint_path(tmp_path, step), progress)
    assert _chosen_checkpoint(tmp_path).progress.step == 100
    (tmp_path / RESULTS).write_text(json.dumps({"checkpoint": "step_00000200"}))
    assert _chosen_checkpoint(tmp_path).progress.step == 200
    assert not caplog.messages
    # evaluated once, pruned by a longer training since
    (tmp_path / RESULTS).write_text(json.dumps({"checkpoint": "step_00000050"}))
    assert _chosen_checkpoint(tmp_path).progress.step == 100
    (said,) = caplog.messages
    assert "evaluated at checkpoint step_00000050, which is gone; recommending by step_00000100" in said
    assert f"gbla-rec evaluate --run-dir {tmp_path}" in said


def test_what_is_damaged_is_named_and_never_passed_over(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 100).mkdir(parents=True)
    for results in (None, json.dumps({"checkpoint": "step_00000100"}), "[]", "{", '{"checkp'):
        if results is not None:
            (tmp_path / RESULTS).write_text(results)
        with pytest.raises(ValueError, match="damaged"):
            _chosen_checkpoint(tmp_path)


def test_an_item_with_a_blank_title_is_named_by_its_id() -> None:
    items = pl.DataFrame({"item_id": [10, 20, 30, 40], "title": ["film", None, "", "  "]})
    dataset = SimpleNamespace(items=lambda: items, manifest=SimpleNamespace(text_columns=("title",)))
    semantic_ids = SimpleNamespace(codes=torch.arange(4)[:, None], widths=(4,))
    model = SimpleNamespace(objective="generative", has_item_head=False)
    config = SimpleNamespace(model=model)
    parts: Any = SimpleNamespace(config=config, dataset=dataset, semantic_ids=semantic_ids, device=torch.device("cpu"))
    recommender = Recommender(parts)
    assert recommender.titles == ["film", "20", "30", "40"]
    # and can be typed so
    assert recommender._resolve(["film", "30", "40"]) == [0, 2, 3]
