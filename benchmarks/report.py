"""Write a benchmark's figures with their origin: hardware, versions, commit, command and date."""

import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "numpy", "polars", "pyarrow")


def write_report(name: str, rows: list[dict[str, Any]], command: str, notes: str) -> Path:
    """Write ``results/<name>.json`` and ``results/<name>.md``.

    Args:
        name: name of the benchmark.
        rows: one figure or group of figures each; keys are the table's columns, with their units.
        command: the command line that was run, from the root of the repository.
        notes: what was measured and how (shapes, median of how many runs, the peer).

    Returns:
        The Markdown file.
    """
    origin = {"date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": _commit(), "command": command, "hardware": _hardware()}
    report = {"name": name, **origin, "versions": _versions(), "notes": notes, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    _replace(RESULTS / f"{name}.json", json.dumps(report, indent=2) + "\n")
    markdown = RESULTS / f"{name}.md"
    _replace(markdown, _markdown(report))
    return markdown


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _markdown(report: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(column for row in report["rows"] for column in row))
    lines = [f"# {report['name']}", "", report["notes"], ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column, "")) for column in columns) + " |" for row in report["rows"]]
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


def _cell(value: Any) -> str:
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
    commit = _output("git", "rev-parse", "--short=12", "HEAD").strip() or "unknown"
    return commit + ("-dirty" if _output("git", "status", "--porcelain").strip() else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
