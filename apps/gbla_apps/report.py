"""``gbla-rec report``: one page of tables and plots about evaluated runs, as HTML and as Markdown."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from gbla_apps import command_line
from gbla_rec.evaluation.report import report

DESCRIPTION = (
    "Write report.html, which needs no other file, and report.md with its figures. RUN is a run directory, or a name of runs in the "
    "workspace (* stands for any part), which takes the newest evaluated run of each seed. Runs that differ in the seed only are averaged."
)


def main(arguments: Sequence[str]) -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(prog="gbla-rec report", description=DESCRIPTION)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN", help="run directories or names")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="where the files go; made if need be")
    options = parser.parse_args(arguments)
    markdown, html = report(options.runs).write(options.output)
    print(f"written to {html} and {markdown}")


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
