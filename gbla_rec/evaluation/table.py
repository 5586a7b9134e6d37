"""The results of an evaluation as tables for the terminal (one method a column) and for Markdown (one method a row)."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from gbla_rec.evaluation.overrides import overrides_of, overrides_text
from gbla_rec.evaluation.terminal_table import fitted_tables

SLICED_METRICS = ("Recall@10", "NDCG@10")
"""What tables of slices and of beams show, where it was evaluated; else the first metric."""
SLICE_TITLES = {
    "history_length": "events before the targets",
    "rarest_target_events": "training events of the target (of the rarest, if there are several)",
}
INTERVAL = "mean (95 % bootstrap interval over users)"


def results_tables(results: Mapping[str, Any], width: int) -> Iterator[Table]:
    """Tables of the main figures, of the other treatment of the history, and of the beam sweep, as far as they were evaluated.

    The best mean of each metric is bold.

    Args:
        results: what ``gbla_rec.evaluation.evaluate.evaluate`` returns: ``methods`` maps a method to its metrics, each with
            ``mean``, ``low`` and ``high``, and beside a baseline ``first_minus_this`` with its own interval.
        width: letters of a line of the terminal; what does not fit goes on in a further table.

    Raises:
        ValueError: if there is no method, or two methods have different metrics.
    """
    yield from _methods_tables(results, width)
    if results.get("other_history"):
        yield from _methods_tables(other_column(results), width)
    names, rows = sweep_rows(results) if results.get("beam_sweep") else ([], [])
    # a model without a decoder has no beams to sweep
    if names:
        cells = [(beams, [Text(cell) for cell in values]) for beams, *values in rows]
        yield from fitted_tables(names, cells, label="beams", width=width, title="numbers of beams", caption=INTERVAL)


def other_column(results: Mapping[str, Any]) -> dict[str, Any]:
    """The other treatment of the history in the form of results."""
    other = results["other_history"]
    return {
        **results,
        "methods": other["methods"],
        "slices": other["slices"],
        "protocol": {**results["protocol"], "history": other["history"]},
    }


def preferred_metrics(metrics: list[str]) -> list[str]:
    """Those of ``metrics`` that are shown where there is room for few: ``SLICED_METRICS``, else the first."""
    return [metric for metric in SLICED_METRICS if metric in metrics] or metrics[:1]


def sweep_rows(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns (``method, metric``) and rows of the beam sweep, methods that depend on beams; ``-`` where beams cannot fill a cutoff."""
    swept = [method for method in results["scores"].values() if any(method in row["methods"] for row in results["beam_sweep"])]
    columns = [(method, metric) for method in swept for metric in preferred_metrics(_metrics(results))]
    rows = [
        [
            f"{row['num_beams']:,}",
            *(_cell(found[metric]) if metric in (found := row["methods"].get(method, {})) else "-" for method, metric in columns),
        ]
        for row in results["beam_sweep"]
    ]
    return [f"{method}, {metric}" for method, metric in columns], rows


def slice_rows(results: Mapping[str, Any], slicing: str, metric: str) -> tuple[list[str], list[list[str]]]:
    """Columns (``users``, methods) and rows of the slices of one metric; ``-`` where a slice has no user."""
    rows = [
        [
            part["label"],
            f"{part['users']:,}",
            *(_cell(part["methods"][method][metric]) if part["users"] else "-" for method in results["methods"]),
        ]
        for part in results["slices"][slicing]
    ]
    return ["users", *results["methods"]], rows


def _methods_tables(results: Mapping[str, Any], width: int) -> Iterator[Table]:
    metrics, methods = _metrics(results), results["methods"]
    rows = [
        (metric, [Text(_cell(values[metric]), "bold" if _is_best(results, method, metric) else "") for method, values in methods.items()])
        for metric in metrics
    ]
    return fitted_tables(list(methods), rows, label="metric", width=width, title=_caption(results), caption=INTERVAL)


def results_markdown(results: Mapping[str, Any]) -> str:
    """The same tables in Markdown, with one line per metric and baseline for the paired difference, and the slices.

    Args:
        results: as for ``results_tables``.

    Raises:
        ValueError: as ``results_tables``.
    """
    blocks = [_methods_markdown(results)]
    if results.get("other_history"):
        blocks.append(_methods_markdown(other_column(results)))
    if results.get("beam_sweep"):
        names, rows = sweep_rows(results)
        blocks.append(markdown_table(["beams", *names], rows))
    for slicing, title in SLICE_TITLES.items() if results.get("slices") else ():
        for metric in preferred_metrics(_metrics(results)):
            names, rows = slice_rows(results, slicing, metric)
            blocks.append(f"{metric} by {title}\n\n{markdown_table([slicing, *names], rows)}")
    return "\n".join(blocks)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are aligned to the right."""
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _methods_markdown(results: Mapping[str, Any]) -> str:
    metrics = _metrics(results)
    rows = []
    for method, values in results["methods"].items():
        cells = [f"**{_cell(values[metric])}**" if _is_best(results, method, metric) else _cell(values[metric]) for metric in metrics]
        rows.append([method, *cells])
    first = next(iter(results["methods"]))
    differences = [
        f"- {first} minus {method}, {metric}: {values[metric]['first_minus_this']:+.4f} "
        f"[{values[metric]['difference_low']:+.4f}, {values[metric]['difference_high']:+.4f}]"
        for method, values in results["methods"].items()
        for metric in metrics
        if "first_minus_this" in values[metric]
    ]
    text = f"{_caption(results)}; {INTERVAL}\n\n{markdown_table(['method', *metrics], rows)}"
    return text + ("\n" + "\n".join(differences) + "\n" if differences else "")


def _metrics(results: Mapping[str, Any]) -> list[str]:
    methods: Mapping[str, Mapping[str, Any]] = results["methods"]
    if not methods:
        raise ValueError("results must hold at least one method, got none")
    first, *others = methods
    for method in others:
        if list(methods[method]) != list(methods[first]):
            raise ValueError(
                f"all methods must have the same metrics, {first} has {list(methods[first])} and {method} has {list(methods[method])}"
            )
    return list(methods[first])


def _is_best(results: Mapping[str, Any], method: str, metric: str) -> bool:
    means = {name: values[metric]["mean"] for name, values in results["methods"].items()}
    return len(means) > 1 and bool(means[method] == max(means.values()))


def _cell(value: Mapping[str, float]) -> str:
    # no square brackets: rich reads them as markup
    return f"{value['mean']:.4f} ({value['low']:.4f}-{value['high']:.4f})"


def _caption(results: Mapping[str, Any]) -> str:
    protocol = results.get("protocol", {})
    parts = [str(results["dataset"]["name"])] if "dataset" in results else []
    parts += [
        f"{protocol[key]:,} {key}" if isinstance(protocol[key], int) else str(protocol[key])
        for key in ("split", "users", "candidates")
        if key in protocol
    ]
    if results.get("other_history"):
        parts.append(f"own history {protocol['history']}")
    if "joint_beams" in protocol:
        parts.append(f"joint ranking of {protocol['joint_beams']:,} beams with weight {protocol['beam_weight']:g}")
    overrides = overrides_of(results)
    if overrides:
        parts.append(overrides_text(overrides))
    return ", ".join(parts) or "results"
