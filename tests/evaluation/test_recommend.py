"""Recommendations come from the checkpoint that was tested, and name every item."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from gbla_rec.checkpoint.run_directory import RESULTS, Progress, checkpoint_path, describe_run, write_progress
from gbla_rec.config import to_json
from gbla_rec.data.histories import StreamPosition
from gbla_rec.evaluation.recommend import Recommender, _chosen_checkpoint
from gbla_rec.recipes import recipe


def save(run_dir: Path, step: int, nll: float) -> None:
    """A checkpoint without tensors."""
    checkpoint_path(run_dir, step).mkdir(parents=True)
    progress = Progress(step=step, position=StreamPosition(), sequence_hash="", world_size=1, validation_nll=nll)
    write_progress(checkpoint_path(run_dir, step), progress)


def test_the_evaluated_checkpoint_goes_before_the_lowest_nll(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 100, 1.0)
    save(tmp_path, 200, 2.0)
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


def test_a_run_that_stopped_early_is_said_to_be_unfinished(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(to_json(recipe("movielens_small")))
    assert describe_run(tmp_path) == f"run {tmp_path}"
    save(tmp_path, 143, 1.0)
    assert describe_run(tmp_path) == f"run {tmp_path}, not finished: saved at step 143 of 450 (--run-dir takes another)"
    save(tmp_path, 450, 1.0)
    assert describe_run(tmp_path) == f"run {tmp_path}"


def test_what_is_damaged_is_named_and_never_passed_over(tmp_path: Path) -> None:
    checkpoint_path(tmp_path, 100).mkdir(parents=True)
    for results in (None, json.dumps({"checkpoint": "step_00000100"}), "[]", "{", '{"checkp'):
        if results is not None:
            (tmp_path / RESULTS).write_text(results)
        with pytest.raises(ValueError, match="damaged"):
            _chosen_checkpoint(tmp_path)
    # nor is another checkpoint taken for the one that was tested
    save(tmp_path, 200, 1.0)
    (tmp_path / RESULTS).write_text(json.dumps({"checkpoint": "step_00000100"}))
    with pytest.raises(ValueError, match=r"step_00000100, at which .* was evaluated, is damaged: it has no progress\.json"):
        _chosen_checkpoint(tmp_path)


def test_an_item_with_a_blank_title_is_named_by_its_id() -> None:
    recommender = recommender_of(["film", None, "", "  "])
    assert recommender.titles == ["film", "20", "30", "40"]
    # and can be typed so
    assert recommender._resolve(["film", "30", "40"]) == [0, 2, 3]


def test_items_of_one_title_are_told_apart_by_their_ids() -> None:
    with pytest.raises(ValueError, match=r"'FILM' names several items: film \(id 10\), Film \(id 30\); give the full title or the id"):
        recommender_of(["film", "other", "Film"])._resolve(["FILM"])


def recommender_of(titles: list[str | None]) -> Recommender:
    """Of a catalogue with ids 10, 20, ...; no model."""
    items = pl.DataFrame({"item_id": [10 * (place + 1) for place in range(len(titles))], "title": titles})
    dataset = SimpleNamespace(items=lambda: items, manifest=SimpleNamespace(text_columns=("title",)))
    semantic_ids = SimpleNamespace(codes=torch.arange(len(titles))[:, None], widths=(len(titles),))
    model = SimpleNamespace(objective="generative", has_item_head=False)
    config = SimpleNamespace(model=model)
    parts: Any = SimpleNamespace(config=config, dataset=dataset, semantic_ids=semantic_ids, device=torch.device("cpu"))
    return Recommender(parts)
