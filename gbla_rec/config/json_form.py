"""Configs as JSON and back, and how two of them differ."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from gbla_rec.config.rules import require

ConfigT = TypeVar("ConfigT")


def to_json(config: Any) -> str:
    """The config as indented JSON; ``from_json`` reads it back."""
    return json.dumps(dataclasses.asdict(config), indent=2, default=str) + "\n"


def from_json(kind: type[ConfigT], text: str) -> ConfigT:
    """Rebuild a config of class ``kind`` from ``to_json``'s text.

    Raises:
        ValueError: if the text names a field that ``kind`` lacks, leaves out one without a default, or a value breaks a rule of the config.
    """
    return cast(ConfigT, _build(kind, json.loads(text), kind.__name__))


def with_defaults(kind: type, saved: Mapping[str, Any]) -> dict[str, Any]:
    """``saved``, the JSON of a config of class ``kind``, with the defaults of the fields that it lacks: those an earlier version had not.

    A new field's default is what was done before it, as in ``from_json``. What ``kind`` does not know stays.
    """
    hints = get_type_hints(kind)
    completed = dict(saved)
    for item in dataclasses.fields(kind):
        if isinstance(saved.get(item.name), Mapping) and dataclasses.is_dataclass(hints[item.name]):
            completed[item.name] = with_defaults(cast(type, hints[item.name]), saved[item.name])
        elif item.name not in saved and item.default is not dataclasses.MISSING:
            completed[item.name] = _json_value(item.default)
        elif item.name not in saved and item.default_factory is not dataclasses.MISSING:
            completed[item.name] = _json_value(item.default_factory())
    return completed


def differing_fields(first: object, second: object, prefix: str = "") -> list[str]:
    """Dotted names of the fields in which two configs of one class differ."""
    assert dataclasses.is_dataclass(first)
    names = []
    for item in dataclasses.fields(first):
        left, right = getattr(first, item.name), getattr(second, item.name)
        if dataclasses.is_dataclass(left):
            names += differing_fields(left, right, f"{prefix}{item.name}.")
        elif left != right:
            names.append(prefix + item.name)
    return names


def _json_value(value: Any) -> Any:
    plain = dataclasses.asdict(value) if dataclasses.is_dataclass(value) and not isinstance(value, type) else value
    return json.loads(json.dumps(plain, default=str))


def _build(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        require(isinstance(value, dict), where, "be an object with the fields of the config", value)
        hints = get_type_hints(kind)
        needed = [item.name for item in dataclasses.fields(kind) if item.default is item.default_factory is dataclasses.MISSING]
        absent = [name for name in needed if name not in value]
        require(not absent, where, f"have the fields {needed}", sorted(value))
        unknown = sorted(set(value) - set(hints))
        require(not unknown, where, f"have only the fields {sorted(hints)}", unknown)
        return cast(Any, kind)(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if get_origin(kind) is tuple:
        return tuple(_build(get_args(kind)[0], item, where) for item in value)
    if value is not None and Path in (kind, *get_args(kind)):
        return Path(value)
    return value
