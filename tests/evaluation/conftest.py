"""Evaluated runs without a model: the files that evaluation leaves, from values that a test makes up."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from gbla_rec.evaluation.per_user import write_per_user
from gbla_rec.evaluation.slices import slices_at
from gbla_rec.evaluation.summaries import summarise, summarise_slices

SLICES = {"history_length": (10, 20), "rarest_target_events": (1,)}


class EvaluatedRuns:
    """Writes the files of evaluated runs into a workspace."""

    def __init__(self, workspace: Path) -> None:
        self.workspace = workspace

    def write(self, name: str, seed: int, values: np.ndarray, *, started: str = "1", **changes: Any) -> Path:
        """``values (U,)`` are Recall@10; NDCG@10 is half of it; the baseline has 0.25 everywhere, and with the history removed 0.5."""
        run_dir = self.workspace / "runs" / name / f"{started}-{seed}"
        run_dir.mkdir(parents=True)
        columns = {"kept": columns_of(name, values, 0.25)}
        if changes.get("both_histories"):
            columns["removed"] = columns_of(name, values + 0.1, 0.5)
        numbers = np.arange(len(values))
        slices = {label: slices_at(numbers % 40, edges) for label, edges in SLICES.items()}
        labels = [np.select([part.members for part in parts], [part.label for part in parts], "").tolist() for parts in slices.values()]
        users = pl.DataFrame({"user_row": numbers + changes.get("first_user", 0), **dict.fromkeys(slices, numbers % 40)})
        users = users.with_columns(history_slice=pl.Series(labels[0]), cold_slice=pl.Series(labels[1]))
        results = {
            "checkpoint": "step_00000010",
            "dataset": {"name": changes.get("dataset", "films"), "content_hash": changes.get("content_hash", "abc")},
            "protocol": {"split": changes.get("split", "test"), "users": len(values), "targets": len(values), "candidates": 9}
            | {"history": "kept", "num_beams": 50},
            "scores": {"generative": name},
            "methods": summarise(columns["kept"], 20),
            "slices": {label: summarise_slices(columns["kept"], parts, 20) for label, parts in slices.items()},
            "other_history": {"history": "removed"} if changes.get("both_histories") else None,
            "beam_sweep": changes.get("beam_sweep", []),
            "per_user": write_per_user(run_dir, users, columns),
            "config": {"name": name, "seed": seed, "model": {"encoder": encoder(changes.get("pattern", "SGG"))}},
            "versions": {"commit": "0" * 40},
        }
        (run_dir / "results.json").write_text(json.dumps(results))
        (run_dir / "config.json").write_text("{}")
        return run_dir


def columns_of(name: str, values: np.ndarray, baseline: float) -> dict[str, dict[str, np.ndarray]]:
    flat = np.full(len(values), baseline)
    return {name: {"Recall@10": values, "NDCG@10": values / 2}, "item-kNN": {"Recall@10": flat, "NDCG@10": flat / 2}}


def encoder(pattern: str) -> dict[str, Any]:
    return {"pattern": pattern, "num_repeats": 2, "direction": "bidirectional"}


@pytest.fixture
def evaluated_runs(workspace: Path) -> EvaluatedRuns:
    return EvaluatedRuns(workspace)
