"""``gbla-rec compare``: paired differences of evaluated runs, with intervals over users and over seeds; needs no model and no GPU."""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from gbla_apps import command_line
from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import write_text
from gbla_rec.evaluation.compare import compare
from gbla_rec.evaluation.comparison_table import comparison_table, comparisons_markdown, difference_line
from gbla_rec.evaluation.output_directory import output_directory
from gbla_rec.evaluation.run_group import RunGroup, told_apart

DESCRIPTION = (
    "Compare evaluated runs by the same users. RUN is a run directory, or a name of runs in the workspace (* stands for any part), which "
    "takes the newest evaluated run of each seed. The first RUN is compared with each other one; --a and --b make two groups of several."
)
LONGEST_SIDE, LONGEST_NAME, DIGEST_LETTERS = 60, 200, 8
"""Letters of a directory's name for one group, and in all: file systems take 255 bytes."""


def main(arguments: Sequence[str]) -> None:
    """Parse, compare, write and print."""
    options = parser().parse_intermixed_args(arguments)
    first, *others = groups(options)
    methods = {"first_method": options.score or options.a_score, "second_method": options.score or options.b_score}
    comparisons = [compare(first, other, **methods, history=options.history, num_samples=options.samples) for other in others]
    output = options.output or workspace.root() / "comparisons" / directory_name([first, *others], methods, options.history)
    with output_directory(output):
        write_text(output / "comparison.md", comparisons_markdown(comparisons))
        write_text(output / "comparison.json", json.dumps(comparisons, indent=2) + "\n")
    # after the files: who reads the output may end early
    console = Console()
    for comparison in comparisons:
        console.print(comparison_table(comparison))
        console.print(difference_line(comparison), markup=False, highlight=False, soft_wrap=True)
    print(f"written to {output / 'comparison.md'} and comparison.json beside it")


def parser() -> argparse.ArgumentParser:
    """The options."""
    options = argparse.ArgumentParser(prog="gbla-rec compare", description=DESCRIPTION)
    options.add_argument("runs", nargs="*", metavar="RUN", help="two or more, each a group of its own")
    options.add_argument("--a", nargs="+", default=[], metavar="RUN", help="runs of the first group")
    options.add_argument("--b", nargs="+", default=[], metavar="RUN", help="runs of the second group")
    options.add_argument("--score", metavar="NAME", help="generative, item, joint or a baseline's name (default: each run's main score)")
    options.add_argument("--a-score", metavar="NAME", help="the score of the first group")
    options.add_argument("--b-score", metavar="NAME", help="the score of the other groups")
    options.add_argument("--history", choices=("kept", "removed"), help="treatment of the own history (default: that of the first run)")
    options.add_argument("--samples", type=int, default=2_000, metavar="N", help="resampled sets of users (default: 2000)")
    options.add_argument("--output", type=Path, metavar="DIR", help="where the files go (default: comparisons/ in the workspace)")
    return options


def groups(options: argparse.Namespace) -> list[RunGroup]:
    """The groups that the options name, two at least; unlike ones have distinct names."""
    if bool(options.a) != bool(options.b) or bool(options.runs) == bool(options.a):
        given = [name for name in ("RUN", "--a", "--b") if getattr(options, name.removeprefix("--").replace("RUN", "runs"))]
        raise ValueError(
            "what to compare must be given as two or more RUN, or as both --a RUN [RUN ...] and --b RUN [RUN ...], "
            f"got {', '.join(given) or 'nothing'}"
        )
    if options.a:
        return told_apart([RunGroup.find(options.a), RunGroup.find(options.b)])
    if len(options.runs) < 2:
        raise ValueError(f"RUN must be given at least twice, got {options.runs}; --a and --b take several runs each")
    return told_apart([RunGroup.find([run]) for run in options.runs])


def directory_name(groups: Sequence[RunGroup], methods: Mapping[str, str | None], history: str | None) -> str:
    """Names, scores and treatment of the history, as far as they were asked for: another comparison replaces none."""
    scores = [methods["first_method"], *[methods["second_method"]] * (len(groups) - 1)]
    sides = [plain(f"{group.name}.{score}" if score else group.name) for group, score in zip(groups, scores, strict=True)]
    return plain("_vs_".join(sides) + (f"_{history}" if history else ""), LONGEST_NAME)


def plain(name: str, longest: int = LONGEST_SIDE) -> str:
    """A file name; a long one ends with a digest of the whole."""
    letters = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
    if len(letters) <= longest:
        return letters
    return f"{letters[: longest - DIGEST_LETTERS - 1]}-{hashlib.sha256(name.encode()).hexdigest()[:DIGEST_LETTERS]}"


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
