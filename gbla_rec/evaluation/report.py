"""A page about evaluated runs: metrics with intervals, paired differences, slices, ablations by pattern, beams, training curves."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from gbla_rec import workspace
from gbla_rec.evaluation.compare import METHOD, compare
from gbla_rec.evaluation.comparison_table import comparison_cells, comparison_columns
from gbla_rec.evaluation.overrides import overrides_of
from gbla_rec.evaluation.per_user import History
from gbla_rec.evaluation.report_data import NUM_SAMPLES, DatasetRuns, group_runs, training_curve
from gbla_rec.evaluation.report_page import Block, Figure, Heading, Page, Paragraph, TextTable
from gbla_rec.evaluation.report_plots import Estimate, interval_plot, pattern_bars, require_matplotlib, slice_plot, training_plot
from gbla_rec.evaluation.run_group import RunGroup
from gbla_rec.evaluation.searched_beams import beams_cell, searched_beams
from gbla_rec.evaluation.table import SLICE_TITLES, preferred_metrics, sweep_rows

MethodEstimates = Mapping[str, Mapping[str, Estimate]]
"""Method -> metric -> estimate."""


def report(specifications: Sequence[str | Path]) -> Page:
    """The page about all runs that ``specifications`` find: run directories, or names of runs in the workspace.

    Raises:
        ModuleNotFoundError: without matplotlib.
        FileNotFoundError: if a specification finds no evaluated run.
        ValueError: if runs of one dataset were evaluated on different users, or a group has a seed twice; names them.
    """
    require_matplotlib()
    parts = group_runs(specifications)
    blocks: list[Block] = []
    for number, runs in enumerate(parts):
        blocks += _dataset_blocks(runs, f"{number}_{runs.first.results['dataset']['name']}_" if len(parts) > 1 else "")
    blocks += [Heading("How intervals are computed"), Paragraph(METHOD)]
    return Page("Retrieval quality", blocks)


def _dataset_blocks(runs: DatasetRuns, prefix: str) -> Iterator[Block]:
    """``prefix`` makes the names of figures distinct between datasets."""
    protocol, dataset = runs.first.results["protocol"], runs.first.results["dataset"]
    yield Heading(f"{dataset['name']}, {protocol['split']}")
    yield Paragraph(
        f"{protocol['users']:,} users, {protocol['targets']:,} targets, {protocol['candidates']:,} candidates (all items). Content of "
        f"the dataset: {dataset['content_hash']}. Figures are means over seeds with 95 % bootstrap intervals over users; ± is the "
        "standard deviation over seeds."
    )
    estimates = {history: runs.estimates(history) for history in runs.histories}
    for history, found in estimates.items():
        yield from _metric_blocks(found, history, prefix)
    history = runs.histories[0]
    if len(runs.groups) > 1:
        yield from _difference_blocks(runs, history)
    yield from _slice_blocks(runs, history, prefix)
    if len(runs.groups) > 1:
        yield from _pattern_blocks(runs, estimates[history], history, prefix)
    yield from _sweep_blocks(runs)
    yield from _training_blocks(runs, prefix)
    yield from _run_blocks(runs)


def _metric_blocks(estimates: MethodEstimates, history: History, prefix: str) -> Iterator[Block]:
    yield Heading(f"Metrics, own history {history}", 3)
    metrics = list(dict.fromkeys(metric for found in estimates.values() for metric in found))
    yield TextTable(
        ["method", "seeds", *metrics],
        [
            [
                method,
                str(max(1, len(next(iter(found.values())).seeds))),
                *(_cell(found[metric]) if metric in found else "-" for metric in metrics),
            ]
            for method, found in estimates.items()
        ],
    )
    for metric in preferred_metrics(metrics):
        shown = {method: found[metric] for method, found in estimates.items() if metric in found}
        yield Figure(f"{prefix}{_file_name(metric)}_{history}", interval_plot(shown, metric), f"{metric}, own history {history}")


def _difference_blocks(runs: DatasetRuns, history: History) -> Iterator[Block]:
    first, *others = runs.groups
    yield Heading(f"Paired differences from {first.name}, own history {history}", 3)
    comparisons = [(other, compare(first, other, history=history, num_samples=NUM_SAMPLES)) for other in others]
    metrics = list(dict.fromkeys(metric for _, found in comparisons for metric in found["metrics"]))
    for metric in preferred_metrics(metrics):
        rows = [[other.name, *comparison_cells(found["metrics"][metric])] for other, found in comparisons if metric in found["metrics"]]
        yield TextTable([f"{metric}: {first.name} minus", *comparison_columns(first.name, "the other")], rows)


def _slice_blocks(runs: DatasetRuns, history: History, prefix: str) -> Iterator[Block]:
    for slicing, title in SLICE_TITLES.items():
        yield Heading(f"By {title}, own history {history}", 3)
        sliced = runs.sliced(slicing, history)
        for metric in preferred_metrics(list(next(iter(sliced.methods.values())))):
            lines = {method: found[metric] for method, found in sliced.methods.items() if metric in found}
            rows = [
                [label, f"{sliced.users[place]:,}", *(_cell(estimates[place]) for estimates in lines.values())]
                for place, label in enumerate(sliced.labels)
            ]
            yield TextTable([metric, "users", *lines], rows)
            plot = slice_plot(lines, sliced.labels, metric, title)
            yield Figure(f"{prefix}{_file_name(metric)}_by_{slicing}", plot, f"{metric} by {title}")


def _pattern_blocks(runs: DatasetRuns, estimates: MethodEstimates, history: History, prefix: str) -> Iterator[Block]:
    yield Heading("By encoder pattern", 3)
    by_pattern: dict[str, dict[str, Mapping[str, Estimate]]] = {}
    for group in sorted(runs.groups, key=_pattern):
        by_pattern.setdefault(_pattern(group), {})[group.name] = estimates[group.name]
    for metric in preferred_metrics(list(estimates[runs.groups[0].name])):
        bars = {pattern: {name: found[metric] for name, found in named.items()} for pattern, named in by_pattern.items()}
        name = f"{prefix}{_file_name(metric)}_by_pattern"
        yield Figure(name, pattern_bars(bars, metric), f"{metric} by encoder pattern, own history {history}")


def _sweep_blocks(runs: DatasetRuns) -> Iterator[Block]:
    swept = [(group, run) for group in runs.groups for run in group.runs if run.results["beam_sweep"]]
    if swept:
        yield Heading("Numbers of beams", 3)
        yield Paragraph("The checkpoint is chosen at the configured number of beams.")
    for group, run in swept:
        names, rows = sweep_rows(run.results)
        yield TextTable([f"{group.name}, seed {run.seed}: beams", *names], rows)


def _training_blocks(runs: DatasetRuns, prefix: str) -> Iterator[Block]:
    curves = {group.name: [training_curve(run) for run in group.runs] for group in runs.groups}
    if any(curve.loss or curve.validation for found in curves.values() for curve in found):
        yield Heading("Training", 3)
        yield Figure(f"{prefix}training", training_plot(curves), "Training loss and validation NLL of every seed")


def _within_workspace(run_dir: Path) -> str:
    """The path as it is in any copy of the workspace."""
    root, path = workspace.root().resolve(), run_dir.resolve()
    return str(path.relative_to(root) if path.is_relative_to(root) else run_dir)


def _run_blocks(runs: DatasetRuns) -> Iterator[Block]:
    yield Heading("Runs", 3)
    rows = [
        [
            group.name,
            str(run.seed),
            _pattern(group),
            beams_cell(searched_beams(run.results), overrides_of(run.results)),
            run.results["checkpoint"],
            str(run.results["versions"]["commit"]),
            _within_workspace(run.run_dir),
        ]
        for group in runs.groups
        for run in group.runs
    ]
    yield TextTable(["run", "seed", "pattern", "beams", "checkpoint", "commit", "directory"], rows)


def _pattern(group: RunGroup) -> str:
    """``SGG x 2, bidirectional``."""
    encoder = group.config["model"]["encoder"]
    return f"{encoder['pattern']} x {encoder['num_repeats']}, {encoder['direction']}"


def _cell(estimate: Estimate) -> str:
    spread = f" ± {np.std(estimate.seeds, ddof=1):.4f}" if estimate.seeds else ""
    return f"{estimate.mean:.4f}{spread} ({estimate.low:.4f}-{estimate.high:.4f})"


def _file_name(metric: str) -> str:
    return metric.lower().replace("@", "_at_")
