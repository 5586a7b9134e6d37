"""``gbla-rec doctor``: whether this environment can run training, each problem with its cure."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from gbla_apps import command_line
from gbla_rec.doctor.examine import examine
from gbla_rec.doctor.finding import Finding, Status

DESCRIPTION = "Tell whether this environment can run training, and the cure of each problem; status 1 if there is one."


def main(arguments: Sequence[str]) -> None:
    """Parse, examine and report."""
    parser = argparse.ArgumentParser(prog="gbla-rec doctor", description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a JSON list of findings: check, status, found, cure")
    options = parser.parse_args(arguments)
    findings = examine()
    print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2) if options.json else report(findings))
    if any(finding.status is Status.PROBLEM for finding in findings):
        raise SystemExit(1)


def report(findings: Sequence[Finding]) -> str:
    """A line for each finding, its cure on the next, and the counts. Plain text: rich may be what is missing."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8} {finding.check:<17} {finding.found}")
        if finding.cure is not None:
            lines.append(f"{'':<8} {'':<17} cure: {finding.cure}")
    counts = {status: sum(finding.status is status for finding in findings) for status in Status}
    return "\n".join([*lines, "", ", ".join(f"{status}: {count}" for status, count in counts.items())])


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
