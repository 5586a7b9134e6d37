"""What the fields of a config must obey; each error names the field, the rule and the value."""

import re
from typing import get_args


def require(condition: bool, argument: str, rule: str, value: object) -> None:
    """``ValueError`` unless ``condition`` holds: ``argument`` must ``rule``."""
    if not condition:
        raise ValueError(f"{argument} must {rule}, got {value!r}")


def require_positive(config: object, *names: str) -> None:
    """The fields ``names`` of ``config`` must be above zero."""
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{type(config).__name__}.{name}", "be positive", value)


def require_plain_name(argument: str, name: str) -> None:
    """Names become directories and glob patterns."""
    is_plain = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) is not None
    require(is_plain, argument, "consist of letters, digits, '.', '_' and '-', and begin with a letter or digit", name)


def require_choice(config: object, name: str, choices: object) -> None:
    """The field ``name`` of ``config`` must be one of the values of the ``Literal`` ``choices``."""
    value = getattr(config, name)
    require(value in get_args(choices), f"{type(config).__name__}.{name}", f"be one of {get_args(choices)}", value)
