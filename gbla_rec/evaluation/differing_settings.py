"""In what two saved configs differ: names of the settings, both values, and a line for a reader."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from gbla_rec.evaluation.overrides import ADDING_FIELDS

FREE_FIELDS = frozenset(
    {
        "seed",
        "name",
        *(f"evaluation.{name}" for name in ADDING_FIELDS),
    }
)
"""Fields of a config in which the runs of a group may differ: none changes what a run learns or how its main figures are made."""
MOST_SETTINGS, LONGEST_VALUE = 8, 40
"""Settings that a line names, and letters of a value in it."""


def differing_settings(first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of what two saved configs differ in, ``FREE_FIELDS`` aside; a setting that one lacks differs."""
    names = []
    for key in dict.fromkeys([*first, *second]):
        left, right = first.get(key), second.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            names += differing_settings(left, right, f"{prefix}{key}.")
        elif (key not in first or key not in second or left != right) and prefix + key not in FREE_FIELDS:
            names.append(prefix + key)
    return names


def but_semantic_ids(names: Iterable[str]) -> list[str]:
    """``names`` without those of how semantic IDs are made: for runs whose semantic IDs are known to be the same."""
    return [name for name in names if not name.startswith("semantic_ids.")]


def setting_values(names: Iterable[str], first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By name of a setting its values, ``first`` and ``second``; a config that lacks it has none, equal ones are left out."""
    found = {}
    for name in names:
        values = {side: _setting(config, name) for side, config in (("first", first), ("second", second))}
        present = {side: value[0] for side, value in values.items() if value}
        if values["first"] != values["second"]:
            found[name] = present
    return found


def settings_text(values: Mapping[str, Mapping[str, Any]]) -> str:
    """``model.encoder.pattern (SGG, SSS), training.num_steps (40, 100)``; a long list ends with ``and N more``.

    Args:
        values: what ``setting_values`` returns.
    """
    named = [f"{name} ({_value(sides, 'first')}, {_value(sides, 'second')})" for name, sides in values.items()]
    more = len(named) - MOST_SETTINGS
    return ", ".join(named[:MOST_SETTINGS]) + (f" and {more} more" if more > 0 else "")


def _setting(config: Mapping[str, Any], name: str) -> list[Any]:
    """The value of a dotted name alone; empty where ``config`` lacks it."""
    found: Any = config
    for key in name.split("."):
        if not isinstance(found, Mapping) or key not in found:
            return []
        found = found[key]
    return [found]


def _value(sides: Mapping[str, Any], side: str) -> str:
    if side not in sides:
        return "absent"
    value = sides[side]
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."
