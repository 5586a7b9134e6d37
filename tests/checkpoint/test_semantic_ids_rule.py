"""Semantic IDs that were made otherwise than a run says are refused with the options that fit."""

import dataclasses
import json
from pathlib import Path

import pytest

from gbla_rec.checkpoint.semantic_ids_rule import require_settings
from gbla_rec.config import RunConfig, SemanticIdConfig, to_json


def run_with(**settings: object) -> RunConfig:
    return RunConfig(name="a", dataset="a", semantic_ids=SemanticIdConfig(**settings))  # type: ignore[arg-type]


def made_with(**settings: object) -> dict[str, object]:
    return {"config": json.loads(to_json(dataclasses.replace(SemanticIdConfig(), **settings)))}  # type: ignore[arg-type]


@pytest.mark.parametrize("chosen", ["text", "behaviour"])
def test_auto_takes_what_it_chose(chosen: str) -> None:
    require_settings(Path("ids"), made_with(embedding=chosen), run_with(embedding="auto"))
    with pytest.raises(ValueError, match=r"train with --semantic-ids.embedding text_and_behaviour, or"):
        require_settings(Path("ids"), made_with(embedding="text_and_behaviour"), run_with(embedding="auto"))


def test_other_settings_are_named_and_younger_ones_have_their_default() -> None:
    with pytest.raises(ValueError, match=r"train with --semantic-ids.embedding behaviour --semantic-ids.seed 3, or remove ids and"):
        require_settings(Path("ids"), made_with(embedding="behaviour", seed=3), run_with())
    older = made_with()
    del older["config"]["balance"]  # type: ignore[attr-defined]
    require_settings(Path("ids"), older, run_with())
    with pytest.raises(ValueError, match=r"--semantic-ids.balance None"):
        require_settings(Path("ids"), older, run_with(balance=2.0))
    require_settings(Path("ids"), {"config": None}, run_with(seed=9))
