"""Writes the report of a table from its finished runs: ``python -m benchmarks.quality.collect TABLE --dataset D``.

``benchmarks/results/quality_<table>_<dataset>.md`` and ``.json``: means over seeds with the spread of the seeds and the interval over
users, the paired differences to the table's reference row and of each row to each, and what each row cost. The page shows differences
at one cutoff; ``details`` of the JSON has every metric. Give it the options that the runs were made with.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from benchmarks.quality.attempts import attempts
from benchmarks.quality.run import add_table_options, chosen_jobs, split_arguments
from benchmarks.quality.run_job import EVALUATE, TRAIN, RunJob
from benchmarks.quality.tables import TABLES, Table
from benchmarks.report import RESULTS, write_report
from gbla_rec.evaluation.bootstrap import percentile_interval, resampled_means
from gbla_rec.evaluation.compare import METHOD, compare
from gbla_rec.evaluation.per_user import values_of
from gbla_rec.evaluation.run_group import EvaluatedRun, RunGroup
from gbla_rec.evaluation.table import SLICE_TITLES

NUM_SAMPLES = 2_000
PAIRS = "Main scores, row against row"
ALL_PAIRS, ALL_FIGURES, SEEDS = "Main scores, row against row, all metrics", "All figures", "Single runs"
"""Titles of the tables that are in the JSON alone."""
NOTES = (
    "{text} {dataset}: {users:,} test users, {candidates:,} candidates, {beams} beams{of_joint}, items of the own history {history}. Test "
    "at the checkpoint of the best validation recall. Cells: mean over seeds ± standard deviation of the seeds (95 % bootstrap interval of "
    "the seed-averaged metric over users). Differences are to `{reference}`, by the same score where it has it, and of its own other "
    "scores to its main one. {method} "
    "Baselines without seeds are those of one run. Hardware, versions and commit are those of the runs. The JSON beside this page has all "
    "metrics of all pairs of rows, and of every run with its commit.{unfinished}"
)


@dataclass(frozen=True)
class Row:
    """The finished runs of one configuration."""

    jobs: tuple[RunJob, ...]
    group: RunGroup

    @property
    def name(self) -> str:
        """The configuration's."""
        return self.jobs[0].configuration.name

    @property
    def scores(self) -> Mapping[str, str]:
        """Score -> name of the method in ``results.json`` of the first run, the main score first."""
        return self.group.runs[0].results["scores"]  # type: ignore[no-any-return]


def main(arguments: Sequence[str]) -> int:
    """Parse, collect, write; returns the exit status."""
    own, extra = split_arguments(arguments)
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.collect", description=__doc__)
    add_table_options(parser)
    parser.add_argument("--output", type=Path, default=RESULTS, help="directory of the report (default benchmarks/results)")
    options = parser.parse_args(own)
    try:
        jobs = chosen_jobs(options, extra)
        path = write_table(options.table, options.dataset, jobs, _run_command(own, extra), options.output)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written to {path} and {path.with_suffix('.json').name} beside it")
    return 0


def _run_command(own: Sequence[str], extra: Sequence[str]) -> str:
    """The command that makes the runs."""
    output = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    output.add_argument("--output")
    _, rest = output.parse_known_args(own)
    return shlex.join(["python", "-m", "benchmarks.quality.run", *rest, *(["--", *extra] if extra else [])])


def write_table(table: str, dataset: str, jobs: Sequence[RunJob], command: str, directory: Path) -> Path:
    """Write the report of the finished ``jobs`` into ``directory``; returns the Markdown file.

    Raises:
        ValueError: if no job is finished, or none of the reference row.
    """
    rows = finished_rows(jobs)
    by_name = {row.name: row for row in rows}
    chosen = [job.configuration.name for job in jobs]
    # where --only leaves the table's own out, rows are held to the first that was chosen
    reference_name = TABLES[table].reference if TABLES[table].reference in chosen or not chosen else chosen[0]
    reference = by_name.get(reference_name)
    if reference is None:
        raise ValueError(f"the reference row {reference_name!r} must have a finished run; finished are {sorted(by_name) or 'none'}")
    figures = [figure for row in rows for figure in row_figures(row, reference)] + list(baseline_figures(reference))
    tables = {"Cost": [cost(row) for row in rows]}
    details = {ALL_FIGURES: figures, SEEDS: [line for row in rows for line in seed_figures(row)]}
    if len(rows) > 1:
        details[ALL_PAIRS] = [line for pair in combinations(rows, 2) for line in pair_figures(*pair)]
        cutoff = f"@{_shown_cutoff(figures, TABLES[table])}"
        tables = {PAIRS: [line for line in details[ALL_PAIRS] if line["metric"].endswith(cutoff)], **tables}
    tables = {**{name: lines for name, lines in slice_tables(rows).items() if lines}, **tables}
    if removed := [line for row in rows for line in other_history_figures(row)]:
        tables = {f"Items of the own history {_other_history(reference)}": removed, **tables}
    sweep = [line for row in rows for line in sweep_figures(row)]
    if sweep:
        tables = {"Beams": sweep, **tables}
    notes = _notes(TABLES[table], dataset, jobs, rows, reference)
    name, origin = f"quality_{table}_{dataset}", _origin(rows)
    return write_report(
        name, _shown(figures, TABLES[table]), command, notes, tables=tables, details=details, origin=origin, directory=directory
    )


def finished_rows(jobs: Sequence[RunJob]) -> list[Row]:
    """One row per configuration with a finished run, in the order of the jobs."""
    by_name: dict[str, list[RunJob]] = {}
    for job in jobs:
        if job.results is not None:
            by_name.setdefault(job.configuration.name, []).append(job)
    return [Row(tuple(found), RunGroup.of([_opened(job) for job in found], name)) for name, found in by_name.items()]


def _opened(job: RunJob) -> EvaluatedRun:
    path = job.results
    assert path is not None
    return EvaluatedRun.open(path.parent)


def row_figures(row: Row, reference: Row) -> Iterator[dict[str, Any]]:
    """One line per score and metric: mean, spread of seeds, interval over users, and the paired difference to ``reference``."""
    for score in row.scores:
        is_reference = row is reference and score == next(iter(reference.scores))
        other = score if score in reference.scores and row is not reference else None
        found = compare(row.group, reference.group, first_method=score, second_method=other, num_samples=NUM_SAMPLES)["metrics"]
        intervals = user_intervals(row.group, score)
        for metric, values in found.items():
            low, high = intervals[metric]
            line = {
                "configuration": row.name,
                "what": row.jobs[0].configuration.text,
                "score": score,
                "seeds": len(row.group.runs),
                "metric": metric,
                "mean": values["first"],
                "seed sd": values["first_seed_sd"],
                "low": low,
                "high": high,
            }
            if not is_reference:
                line |= {"difference": values["difference"], "difference low": values["low"], "difference high": values["high"]}
                line |= {"with seeds low": values["seeds_low"], "with seeds high": values["seeds_high"]}
            yield line


def seed_figures(row: Row) -> Iterator[dict[str, Any]]:
    """One line per score and run: its seed, the commit that made it, its metrics."""
    for score in row.scores:
        for run in row.group.runs:
            metrics = run.results["methods"][run.results["scores"][score]]
            origin = {"seed": run.seed, "commit": run.results["versions"]["commit"]}
            yield {"configuration": row.name, "score": score, **origin, **{name: values["mean"] for name, values in metrics.items()}}


def pair_figures(first: Row, second: Row) -> Iterator[dict[str, Any]]:
    """One line per metric: the main score of ``first`` minus that of ``second``, whatever these scores are."""
    main_scores = [next(iter(row.scores)) for row in (first, second)]
    found = compare(first.group, second.group, first_method=main_scores[0], second_method=main_scores[1], num_samples=NUM_SAMPLES)
    names = [f"{row.name} ({score})" for row, score in zip((first, second), main_scores, strict=True)]
    for metric, values in found["metrics"].items():
        yield {
            "first": names[0],
            "second": names[1],
            "metric": metric,
            "difference": f"{values['difference']:+.4f}",
            "over users": f"{values['low']:+.4f} to {values['high']:+.4f}",
            "over users and seeds": None if values["seeds_low"] is None else f"{values['seeds_low']:+.4f} to {values['seeds_high']:+.4f}",
        }


def user_intervals(group: RunGroup, score: str) -> dict[str, tuple[float, float]]:
    """Metric -> 95 % bootstrap interval over users of its mean over seeds."""
    by_run = [values_of(run.per_user(), run.results["protocol"]["history"], run.results["scores"][score]) for run in group.runs]
    averaged = {metric: np.mean([values[metric] for values in by_run], axis=0) for metric in by_run[0]}
    draws = resampled_means(np.stack(list(averaged.values()), axis=1), NUM_SAMPLES, 0)
    return {metric: percentile_interval(draws[:, place]) for place, metric in enumerate(averaged)}


def baseline_figures(reference: Row) -> Iterator[dict[str, Any]]:
    """One line per metric of each method of the reference's first run that is no score of a model."""
    results = reference.group.runs[0].results
    for method, metrics in results["methods"].items():
        if method not in results["scores"].values():
            for metric, values in metrics.items():
                line = {"configuration": method, "what": "baseline of every evaluation", "score": "", "seeds": "", "metric": metric}
                yield line | {"mean": values["mean"], "seed sd": None, "low": values["low"], "high": values["high"]}


def sweep_figures(row: Row) -> Iterator[dict[str, Any]]:
    """One line per number of beams and score: means over seeds."""
    swept = [run.results["beam_sweep"] for run in row.group.runs]
    for same_beams in zip(*swept, strict=True):
        for score in row.scores:
            names = [run.results["scores"][score] for run in row.group.runs]
            found = [beams["methods"].get(name) for beams, name in zip(same_beams, names, strict=True)]
            if None not in found:
                yield {"configuration": row.name, "score": score, "beams": same_beams[0]["num_beams"], "seeds": len(swept), **_means(found)}


def other_history_figures(row: Row) -> Iterator[dict[str, Any]]:
    """One line per score with the other treatment of a user's own items, where every run was evaluated with both: means over seeds."""
    others = [run.results["other_history"] for run in row.group.runs]
    if None not in others:
        for score in row.scores:
            of_runs = [other["methods"][run.results["scores"][score]] for other, run in zip(others, row.group.runs, strict=True)]
            yield {"configuration": row.name, "score": score, "seeds": len(others), **_means(of_runs)}


def slice_tables(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """One table per kind of slice, the main score of each configuration: means over seeds."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        main_score = next(iter(row.scores))
        for kind, title in SLICE_TITLES.items():
            for same_slice in zip(*(run.results["slices"].get(kind, []) for run in row.group.runs), strict=True):
                if not same_slice[0]["users"]:
                    continue
                of_runs = [one["methods"][run.results["scores"][main_score]] for one, run in zip(same_slice, row.group.runs, strict=True)]
                line = {"configuration": row.name, "score": main_score, "slice": same_slice[0]["label"], "users": same_slice[0]["users"]}
                tables.setdefault(f"By {title}", []).append({**line, **_means(of_runs)})
    return tables


def _means(of_runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """Metric -> mean over runs."""
    return {metric: mean(values[metric]["mean"] for values in of_runs) for metric in of_runs[0]}


def _other_history(row: Row) -> str:
    other = row.group.runs[0].results["other_history"]
    return str(other["history"]) if other else ""


def cost(row: Row) -> dict[str, Any]:
    """Seconds per run, mean over seeds: of the processes, and their share of the machine among those that ran beside them."""
    spent = []
    for job, run in zip(row.jobs, row.group.runs, strict=True):
        # attempts at an earlier config of this name do not count
        of_run = [attempt for attempt in attempts(job.directory) if attempt.ended_after(run.run_dir.name)]
        spent.append({stage: [attempt for attempt in of_run if attempt.stage == stage] for stage in (TRAIN, EVALUATE)})
    cells: dict[str, Any] = {"configuration": row.name, "steps": row.jobs[0].config.training.num_steps}
    for stage in (TRAIN, EVALUATE):
        for label, attribute in (("s", "seconds"), ("share of the machine (s)", "share_seconds")):
            cells[f"{stage} {label}"] = round(mean(sum(getattr(one, attribute) for one in run[stage]) for run in spent), 1)
    return cells


def _shown(figures: Sequence[Mapping[str, Any]], table: Table) -> list[dict[str, Any]]:
    """One readable line per configuration and score, from the lines per metric."""
    shown_cutoff = _shown_cutoff(figures, table)
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for figure in figures:
        key = (figure["configuration"], figure["score"])
        line = lines.setdefault(key, {name: figure[name] for name in ("configuration", "what", "score", "seeds")})
        spread = "" if figure["seed sd"] is None else f" ± {figure['seed sd']:.4f}"
        line[figure["metric"]] = f"{figure['mean']:.4f}{spread} ({figure['low']:.4f} to {figure['high']:.4f})"
        if figure["metric"].endswith(f"@{shown_cutoff}") and "difference" in figure:
            interval = f"{figure['difference low']:+.4f} to {figure['difference high']:+.4f}"
            line[f"difference of {figure['metric']} (over users)"] = f"{figure['difference']:+.4f} ({interval})"
    return list(lines.values())


def _shown_cutoff(figures: Sequence[Mapping[str, Any]], table: Table) -> int:
    cutoffs = sorted({int(figure["metric"].partition("@")[2]) for figure in figures})
    return max([cutoff for cutoff in cutoffs if cutoff <= table.shown_cutoff], default=cutoffs[0])


def _notes(table: Table, dataset: str, jobs: Sequence[RunJob], rows: Sequence[Row], reference: Row) -> str:
    protocol = reference.group.runs[0].results["protocol"]
    unfinished = [job.name for job in jobs if job.results is None]
    return NOTES.format(
        text=table.text,
        dataset=dataset,
        users=protocol["users"],
        candidates=protocol["candidates"],
        beams=protocol["num_beams"],
        of_joint=_joint_beams(rows),
        history=protocol["history"],
        reference=reference.name,
        method=METHOD,
        unfinished=f" **Unfinished: {', '.join(unfinished)}.**" if unfinished else "",
    )


def _origin(rows: Sequence[Row]) -> dict[str, Any]:
    """Where the runs were made; several machines, versions or commits are all named."""
    machines = {attempt.machine for row in rows for job in row.jobs for attempt in attempts(job.directory)}
    versions: dict[str, set[str]] = {}
    for row in rows:
        for run in row.group.runs:
            for package, number in run.results["versions"].items():
                versions.setdefault(package, set()).add(str(number)[:12])
    # a package that is not installed is that of the commit
    joined = {package: ", ".join(sorted(numbers)) for package, numbers in versions.items() if numbers != {"None"}}
    commit = joined.pop("commit", "unknown")
    return {"commit": commit, "hardware": {"machine": "; ".join(sorted(machines)) or "unknown"}, "versions": joined}


def _joint_beams(rows: Sequence[Row]) -> str:
    """The beams whose items joint scores rank: more than the generative score has."""
    settings = [run.results["config"]["evaluation"] for row in rows if "joint" in row.scores for run in row.group.runs]
    counts = sorted({max(each["joint_beams"], each["num_beams"]) for each in settings})
    return f" (joint: {', '.join(map(str, counts))})" if counts else ""


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
