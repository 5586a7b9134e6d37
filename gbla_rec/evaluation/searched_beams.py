"""How many beams the search behind a score had, as ``results.json`` tells it."""

from collections.abc import Mapping
from typing import Any

from gbla_rec.evaluation.overrides import overrides_text


def searched_beams(results: Mapping[str, Any], method: str | None = None) -> int | None:
    """Beams of the search whose items a method ranked; None for one without a beam search, as the item-level score and baselines.

    Args:
        results: of an evaluated run.
        method: a score, or a name of the results' ``methods``; None takes the main score.
    """
    scores: Mapping[str, str] = results["scores"]
    by_name = {name: score for score, name in scores.items()}
    score = next(iter(scores)) if method is None else by_name.get(method, method)
    protocol = results["protocol"]
    if score == "joint":
        # older results have it in the config alone
        own = protocol.get("joint_beams") or results["config"]["evaluation"]["joint_beams"]
        return int(max(own, protocol["num_beams"]))
    return int(protocol["num_beams"]) if score == "generative" else None


def beams_cell(beams: int | None, overrides: Mapping[str, Mapping[str, Any]]) -> str:
    """The number as a table shows it, with the settings that were not the run's own."""
    number = "-" if beams is None else str(beams)
    return f"{number} ({overrides_text(overrides)})" if overrides else number
