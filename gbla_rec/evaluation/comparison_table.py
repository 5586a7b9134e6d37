"""Comparisons of groups of runs as tables for the terminal and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from gbla_rec.evaluation.differing_settings import settings_text
from gbla_rec.evaluation.overrides import overrides_text
from gbla_rec.evaluation.searched_beams import beams_cell
from gbla_rec.evaluation.table import SLICE_TITLES, markdown_table, preferred_metrics

CAPTION = "± is the standard deviation over seeds; intervals of the difference are 95 %"


def comparison_table(comparison: Mapping[str, Any]) -> Table:
    """One row a metric: both means, their difference, its interval over users, and over users and seeds.

    Args:
        comparison: what ``gbla_rec.evaluation.compare.compare`` returns.
    """
    table = Table(title=_title(comparison), caption=CAPTION)
    for number, name in enumerate(_columns(comparison, "metric")):
        table.add_column(name, justify="right" if number else "left")
    for metric, difference in comparison["metrics"].items():
        table.add_row(metric, *comparison_cells(difference))
    return table


def comparisons_markdown(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """All comparisons with what the groups differ in, their slices, the runs that they are made of, and how intervals are computed."""
    blocks = []
    for comparison in comparisons:
        blocks.append(f"## {_title(comparison)}\n\n{difference_line(comparison)}\n\n{CAPTION}\n\n{_metrics_markdown(comparison)}")
        for slicing, title in SLICE_TITLES.items():
            for metric in preferred_metrics(list(comparison["metrics"])):
                rows = [
                    [part["label"], f"{part['users']:,}", *comparison_cells(part["metrics"][metric])]
                    for part in comparison["slices"][slicing]
                ]
                columns = _columns(comparison, slicing)
                blocks.append(f"{metric} by {title}\n\n{markdown_table([columns[0], 'users', *columns[1:]], rows)}")
        blocks.append(_runs_markdown(comparison))
    return "\n".join(["# Comparison\n", *blocks, comparisons[0]["method"]]) + "\n"


def difference_line(comparison: Mapping[str, Any]) -> str:
    """In what the two groups differ, for a reader: settings with both values, or only the runs, or only the score."""
    first, second = comparison["first"], comparison["second"]
    if comparison["differ_in"]:
        return f"the groups differ in: {settings_text(comparison['differ_in'])}"
    if not comparison["same_runs"]:
        seeds = " and of ".join(", ".join(str(run["seed"]) for run in side["runs"]) for side in (first, second))
        return f"the groups differ in no setting, only in their runs, of seeds {seeds}"
    if first["method"] == second["method"]:
        return "both groups are the same runs with the same score, so every difference is 0"
    return f"both groups are the same runs, the scores differ: {first['method']}, {second['method']}"


def _metrics_markdown(comparison: Mapping[str, Any]) -> str:
    rows = [[metric, *comparison_cells(difference)] for metric, difference in comparison["metrics"].items()]
    return markdown_table(_columns(comparison, "metric"), rows)


def _runs_markdown(comparison: Mapping[str, Any]) -> str:
    rows = [
        [
            comparison[side]["name"],
            str(run["seed"]),
            beams_cell(run["num_beams"], run["overrides"]),
            run["checkpoint"],
            str(run["commit"]),
            run["run"],
        ]
        for side in ("first", "second")
        for run in comparison[side]["runs"]
    ]
    return markdown_table(["group", "seed", "beams", "checkpoint", "commit", "run"], rows)


def _title(comparison: Mapping[str, Any]) -> str:
    protocol = comparison["protocol"]
    names = " minus ".join(_side(comparison, side) for side in ("first", "second"))
    return f"{names}: {protocol['dataset']['name']}, {protocol['split']}, {protocol['users']:,} users, own history {protocol['history']}"


def _side(comparison: Mapping[str, Any], side: str) -> str:
    # the runs of a group have the same settings, whether their own or not
    overrides = {name: values for run in comparison[side]["runs"] for name, values in run["overrides"].items()}
    changed = f" with {overrides_text(overrides)}" if overrides else ""
    return f"{comparison[side]['name']} ({comparison[side]['method']}){changed}"


def _columns(comparison: Mapping[str, Any], first: str) -> list[str]:
    sides = [comparison["first"], comparison["second"]]
    # two methods of one group: its name would stand over both columns
    title = "method" if sides[0]["name"] == sides[1]["name"] else "name"
    return [first, *comparison_columns(sides[0][title], sides[1][title])]


def comparison_columns(first: str, second: str) -> list[str]:
    """Names of what ``comparison_cells`` returns."""
    return [first, second, "difference", "over users", "over users and seeds"]


def comparison_cells(difference: Mapping[str, Any]) -> list[str]:
    """Both means with their spread over seeds, the difference, its interval over users, and over users and seeds."""

    def mean(side: str) -> str:
        spread = difference[f"{side}_seed_sd"]
        return f"{difference[side]:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")

    def interval(prefix: str) -> str:
        low, high = difference[f"{prefix}low"], difference[f"{prefix}high"]
        # no square brackets: rich reads them as markup
        return "one seed" if low is None else f"{low:+.4f} to {high:+.4f}"

    return [mean("first"), mean("second"), f"{difference['difference']:+.4f}", interval(""), interval("seeds_")]
