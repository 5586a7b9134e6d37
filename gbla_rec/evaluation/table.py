"""The results of an evaluation as a table for the terminal (one method a column) and for Markdown (one method a row)."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def results_table(results: Mapping[str, Any]) -> Table:
    """A rich table of ``results.json``; the best mean of each metric is bold.

    Args:
        results: what ``gbla_rec.evaluation.evaluate.evaluate`` returns: ``methods`` maps a method to its metrics, each with
            ``mean``, ``low`` and ``high``, and beside a baseline ``first_minus_this`` with its own interval.

    Raises:
        ValueError: if there is no method, or two methods have different metrics.
    """
    table = Table(title=_caption(results), caption="mean (95 % bootstrap interval over users)")
    methods = results["methods"]
    metrics = _metrics(results)
    # metrics are the rows: three methods fit a terminal of 80 columns
    table.add_column("metric")
    for method in methods:
        table.add_column(method, justify="right")
    for metric in metrics:
        cells = {method: _cell(values[metric]) for method, values in methods.items()}
        table.add_row(metric, *(f"[bold]{cell}[/bold]" if _is_best(results, method, metric) else cell for method, cell in cells.items()))
    return table


def results_markdown(results: Mapping[str, Any]) -> str:
    """The same table in Markdown, then one line per metric and baseline with the paired difference.

    Args:
        results: as for ``results_table``.

    Raises:
        ValueError: as ``results_table``.
    """
    metrics = _metrics(results)
    lines = [f"{_caption(results)}; mean (95 % bootstrap interval over users)", ""]
    lines += ["| method | " + " | ".join(metrics) + " |", "|---|" + "---:|" * len(metrics)]
    for method, values in results["methods"].items():
        cells = [f"**{_cell(values[metric])}**" if _is_best(results, method, metric) else _cell(values[metric]) for metric in metrics]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    first = next(iter(results["methods"]))
    differences = [
        f"- {first} minus {method}, {metric}: {values[metric]['first_minus_this']:+.4f} "
        f"[{values[metric]['difference_low']:+.4f}, {values[metric]['difference_high']:+.4f}]"
        for method, values in results["methods"].items()
        for metric in metrics
        if "first_minus_this" in values[metric]
    ]
    return "\n".join(lines + (["", *differences] if differences else [])) + "\n"


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
    return ", ".join(parts) or "results"
