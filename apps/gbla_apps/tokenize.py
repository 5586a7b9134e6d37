"""``gbla-rec tokenize``: the items of a prepared dataset get semantic IDs."""

import json
import sys
from collections.abc import Sequence

from gbla_apps import command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_rec import workspace
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.tokenize import tokenize

DESCRIPTION = "Give every item of the prepared dataset a semantic ID; only --dataset and --semantic-ids.* matter here."
MUCH_SHARED = 0.9
"""Part of the items. Behaviour alone leaves most items of a small log without anything to tell them apart."""


def main(arguments: Sequence[str]) -> None:
    """Parse and tokenize."""
    config = parse_run_config("tokenize", DESCRIPTION, arguments)
    dataset = PreparedDataset.open(workspace.dataset_dir(config.dataset))
    output = workspace.semantic_ids_dir(config.dataset)
    table = tokenize(dataset, config.semantic_ids, output)
    print(f"{output}: {table.codes.shape[0]:,} items, codebooks {' x '.join(map(str, table.widths))}; quality in report.md")
    before = json.loads((output / "report.json").read_text(encoding="utf-8"))["before_dedup"]
    shared = before["fraction_sharing"]
    print(f"{shared:.0%} of the items had the codes of another one, and are told apart by the last level")
    if shared > MUCH_SHARED:
        print(
            f"warning: the codes say little about the items: {before['num_distinct']:,} different ones for {table.codes.shape[0]:,} "
            "items; embed them by something that tells them apart (--semantic-ids.embedding, --semantic-ids.text-columns), or give more "
            "levels if their embeddings differ (docs/semantic-ids.md)",
            file=sys.stderr,
        )


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
