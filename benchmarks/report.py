"""Write a benchmark's figures with their origin: hardware, versions, commit, command and date."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gbla_rec import workspace

RESULTS = Path(__file__).parent / "results"
COMMIT_VARIABLE = "GBLA_REC_COMMIT"
"""Environment variable with the commit, for machines that have a copy of the tree without its history."""
PACKAGES = (
    "torch",
    "triton",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "numpy",
    "polars",
    "pyarrow",
    "nvidia-cudnn-frontend",
    "flash_bla",
)


def results_directory(chosen: Path | None, *, is_whole: bool) -> Path:
    """Where a report goes: where the caller chose, else the committed results for a whole run, else the workspace.

    A quick look must not replace the figures of another machine.
    """
    if chosen is not None:
        return chosen
    return RESULTS if is_whole else workspace.root() / "benchmarks"


def write_report(
    name: str,
    rows: list[dict[str, Any]],
    command: str,
    notes: str,
    *,
    tables: Mapping[str, list[dict[str, Any]]] | None = None,
    details: Mapping[str, list[dict[str, Any]]] | None = None,
    plots: Sequence[Path] = (),
    origin: Mapping[str, Any] | None = None,
    directory: Path = RESULTS,
) -> Path:
    """Write ``<directory>/<name>.json`` and ``<directory>/<name>.md``.

    Args:
        name: name of the benchmark.
        rows: one figure or group of figures each; keys are the table's columns, with their units.
        command: the command line that was run, from the root of the repository.
        notes: what was measured and how (shapes, median of how many runs, the peer).
        tables: further tables by title, rows as above.
        details: tables that only the JSON has.
        plots: images in ``directory`` to show under the tables.
        origin: ``hardware``, ``versions`` and ``commit`` of figures that another machine or commit made; None: this process's.
        directory: where the files go; made if need be.

    Returns:
        The Markdown file.
    """
    made_by = origin or {"commit": _commit(), "hardware": _hardware(), "versions": _versions()}
    date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    report = {"name": name, "date": date, "command": command, **made_by, "notes": notes, "rows": rows}
    if tables:
        report["tables"] = dict(tables)
    if details:
        report["details"] = dict(details)
    if plots:
        report["plots"] = [plot.name for plot in plots]
    directory.mkdir(parents=True, exist_ok=True)
    _replace(directory / f"{name}.json", json.dumps(report, indent=2) + "\n")
    markdown = directory / f"{name}.md"
    _replace(markdown, _markdown(report))
    return markdown


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['name']}", "", report["notes"], "", *_table(report["rows"])]
    for title, rows in report.get("tables", {}).items():
        lines += ["", f"## {title}", "", *_table(rows)]
    for plot in report.get("plots", []):
        lines += ["", f"![{plot}]({plot})"]
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    hardware = "; ".join(f"{key}: {value}" for key, value in report["hardware"].items())
    lines += [
        "",
        f"- hardware: {hardware}",
        f"- versions: {versions}",
        f"- commit: {report['commit']}",
        f"- date: {report['date']}",
        f"- command: `{report['command']}`",
        "",
    ]
    return "\n".join(lines)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return lines + ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in rows]


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _hardware() -> dict[str, str]:
    models = [line.split(":", 1)[1].strip() for line in _output("lscpu").splitlines() if line.startswith("Model name")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = {"cpu": models[0] if models else platform.machine(), "cores": str(os.cpu_count()), "memory": f"{memory:.0f} GiB"}
    try:
        import torch
    except ImportError:
        return hardware
    if torch.cuda.is_available():
        hardware["gpu"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return hardware


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _commit() -> str:
    if stated := os.environ.get(COMMIT_VARIABLE):
        return stated
    commit = _output("git", "rev-parse", "--short=12", "HEAD").strip() or "unknown"
    return commit + ("-dirty" if _output("git", "status", "--porcelain").strip() else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
