"""In what two configs differ: every difference with both values, and a line that stays short."""

from typing import Any

from gbla_rec.evaluation.differing_settings import LONGEST_VALUE, differing_settings, setting_values, settings_text


def values_of(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return setting_values(differing_settings(first, second), first, second)


def test_values_of_both_sides_are_given_and_a_setting_that_one_lacks_has_none() -> None:
    first = {"seed": 0, "model": {"pattern": "SGG", "head": None}, "training": {"num_steps": 40}}
    second = {"seed": 1, "model": {"pattern": "SSS", "head": {"width": 8}}, "training": {"num_steps": 40, "ema": None}}
    values = values_of(first, second)
    assert values == {
        "model.pattern": {"first": "SGG", "second": "SSS"},
        "model.head": {"first": None, "second": {"width": 8}},
        "training.ema": {"second": None},
    }
    assert settings_text(values) == 'model.pattern (SGG, SSS), model.head (null, {"width": 8}), training.ema (absent, null)'


def test_a_line_names_eight_settings_and_counts_the_rest() -> None:
    text = [settings_text(values_of({f"s{i}": 0 for i in range(count)}, {f"s{i}": 1 for i in range(count)})) for count in (8, 11)]
    assert text[0] == ", ".join(f"s{i} (0, 1)" for i in range(8))
    assert text[1] == f"{text[0]} and 3 more"
    assert len(settings_text(values_of({"s": "x" * 200}, {"s": ""}))) == LONGEST_VALUE + len("s (, )")
