"""Evaluation settings that took the place of the run's own, so that figures made with them are not taken for the run's own."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from gbla_rec.config import EvaluationConfig

ADDING_FIELDS = frozenset({"both_histories", "beam_sweep", "history_edges", "cold_edges", "bootstrap_samples"})
"""Fields of ``EvaluationConfig`` that add figures, slices or resamples and leave the main figures as they are."""


def overridden_settings(own: EvaluationConfig, used: EvaluationConfig) -> dict[str, dict[str, Any]]:
    """Of each setting of the main figures that differs from the run's own: ``own`` and ``used``, as JSON holds them."""
    of_run, of_results = (json.loads(json.dumps(asdict(settings))) for settings in (own, used))
    return {
        name: {"own": value, "used": of_results[name]}
        for name, value in of_run.items()
        if name not in ADDING_FIELDS and of_results[name] != value
    }


def overrides_of(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What ``overridden_settings`` found when ``results.json`` was written; nothing in results from before it was recorded."""
    found: dict[str, dict[str, Any]] = results.get("protocol", {}).get("overrides", {})
    return found


def overrides_text(overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """For a reader; empty where nothing was overridden."""
    return ", ".join(f"{name} {values['used']} in place of the run's {values['own']}" for name, values in overrides.items())
