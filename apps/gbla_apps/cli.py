"""``gbla-rec COMMAND``: dispatches to the entry point of that name."""

import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version

from gbla_apps import command_line

COMMANDS = {
    "demo": "the whole path on MovieLens, in minutes",
    "prepare": "an event log becomes a prepared dataset",
    "tokenize": "items get semantic IDs",
    "plan": "how tables are sharded on a cluster, and what that costs, without having it",
    "train": "train a recipe (also under torchrun and TorchX)",
    "evaluate": "test a run by beam search, beside baselines",
    "compare": "paired differences of evaluated runs, over users and seeds",
    "report": "one page of tables and plots about evaluated runs",
    "recommend": "the next items for a user or a typed-in history",
    "doctor": "whether this environment can train, and the cure of what cannot",
}


def main() -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help", "--version"):
        command_line.run(_about, arguments)
        return
    if arguments[0] not in COMMANDS:
        print(f"error: COMMAND must be one of {', '.join(COMMANDS)}, got {arguments[0]!r}", file=sys.stderr)
        raise SystemExit(2)
    command_line.run(importlib.import_module(f"gbla_apps.{arguments[0]}").main, arguments[1:])


def _about(arguments: Sequence[str]) -> None:
    if arguments and arguments[0] == "--version":
        print(f"gbla-rec {version('gbla-rec')}")
        return
    lines = "\n".join(f"  {name:<10} {meaning}" for name, meaning in COMMANDS.items())
    print(f"usage: gbla-rec COMMAND [options]   (gbla-rec COMMAND --help, gbla-rec --version)\n\n{lines}")


if __name__ == "__main__":
    main()
