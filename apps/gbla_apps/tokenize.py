"""``gbla-rec tokenize``: the items of a prepared dataset get semantic IDs."""

import json
import sys
from collections.abc import Sequence

import numpy as np

from gbla_apps import command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_rec import workspace
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.quantizer import default_codebook_width
from gbla_rec.semantic_ids.tokenize import tokenize

DESCRIPTION = "Give every item of the prepared dataset a semantic ID; only --dataset and --semantic-ids.* matter here."
MUCH_SHARED = 0.9
"""Part of the items. Behaviour alone leaves most items of a small log without anything to tell them apart."""
MOSTLY_ALONE = 0.9
"""Different first codes, as a part of the items: then hardly two items begin alike."""


def main(arguments: Sequence[str]) -> None:
    """Parse and tokenize."""
    config = parse_run_config("tokenize", DESCRIPTION, arguments)
    dataset = PreparedDataset.open(workspace.dataset_dir(config.dataset))
    output = workspace.semantic_ids_dir(config.dataset)
    if output.exists():
        raise FileExistsError(
            f"{output} exists, and a dataset has one set of semantic IDs; delete it to make them anew (runs that were trained on "
            "them refuse others), or prepare the log under another name too"
        )
    table = tokenize(dataset, config.semantic_ids, output)
    num_items = table.codes.shape[0]
    print(f"{output}: {num_items:,} items, codebooks {' x '.join(map(str, table.widths))}; quality in report.md")
    before = json.loads((output / "report.json").read_text(encoding="utf-8"))["before_dedup"]
    shared = before["fraction_sharing"]
    if before["items_sharing"]:
        print(f"{shared:.0%} of the items had the codes of another one, and are told apart by the last level")
    else:
        print("no item had the codes of another one; the last level, which would tell them apart, is 0 for all")
    if shared > MUCH_SHARED:
        warn(
            f"the codes say little about the items: {before['num_distinct']:,} different ones for {num_items:,} "
            "items; embed them by something that tells them apart (--semantic-ids.embedding, --semantic-ids.text-columns), or give more "
            "levels if their embeddings differ (docs/semantic-ids.md)"
        )
    first_codes = len(np.unique(np.asarray(table.codes[:, 0])))
    if config.semantic_ids.num_levels > 1 and first_codes > MOSTLY_ALONE * num_items:
        warn(
            f"items that are alike do not begin alike: {num_items:,} items have {first_codes:,} different first codes; give a smaller "
            f"--semantic-ids.codebook-width, such as {default_codebook_width(num_items, 1)}, here and to train"
        )


def warn(text: str) -> None:
    """On stderr."""
    print(f"warning: {text}", file=sys.stderr)


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
