"""Bytes as people write them: ``80GB`` is 80 x 10^9, ``80GiB`` is 80 x 2^30."""

import re

from gbla_rec.config.rules import require

_LETTERS = "KMGTP"
UNITS = {"B": 1, **{f"{letter}B": 1000 ** (i + 1) for i, letter in enumerate(_LETTERS)}}
UNITS |= {f"{letter}iB": 1024 ** (i + 1) for i, letter in enumerate(_LETTERS)}


def parse_bytes(text: str, argument: str) -> int:
    """The number of bytes that ``text`` says; ``argument`` is named in errors.

    Raises:
        ValueError: if ``text`` is not a positive number followed by a unit.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", text.strip())
    unit = found and next((unit for unit in UNITS if unit.lower() == found[2].lower()), None)
    size = round(float(found[1]) * UNITS[unit]) if found and unit else 0
    require(size > 0, argument, f"be a number and a unit ({', '.join(UNITS)}), like 80GB", text)
    return size


def exact_bytes(size: int) -> str:
    """``size`` for errors, readable and to the byte: ``1.72 GB (1,715,470,336 bytes)``."""
    return f"{format_bytes(size)} ({size:,} bytes)"


def format_bytes(size: float) -> str:
    """``size`` in the largest decimal unit that leaves at least 1, three digits: ``79.9 GB``."""
    unit = max((unit for unit in UNITS if "i" not in unit and UNITS[unit] <= max(abs(size), 1)), key=UNITS.__getitem__)
    value = size / UNITS[unit]
    return f"{value:,.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"
