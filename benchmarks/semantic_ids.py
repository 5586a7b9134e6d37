"""Quality of semantic IDs before any training: evenness, collisions, and what consecutive items' codes say about each other.

Embeddings are made once per dataset and kept in ``--cache``; a finished row is not made again, so the command can be stopped and
run again. ``python benchmarks/semantic_ids.py --cache DIR --datasets amazon_beauty amazon_sports --encoders tfidf wordllama``
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from code_transitions import held_out_bits, mutual_information, prefix_groups, read_transitions, shared_fraction
from numpy.typing import NDArray
from report import RESULTS, write_report

from gbla_rec import workspace
from gbla_rec.config import SemanticIdConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.embeddings import fit_embedder
from gbla_rec.semantic_ids.quantizer import ResidualQuantizer, dedup_slots, default_codebook_width
from gbla_rec.semantic_ids.report import quality_report
from gbla_rec.semantic_ids.table import SemanticIdTable

NEAREST = "nearest"
NOTES = """Semantic IDs of 3 codebooks and a de-duplication level, from each dataset's prepared items and training events. Weight: length of
the behaviour part beside a text part of length 1. Assignment: nearest centroid; `distinct`: distinct last codes under a prefix;
`balance b`: no code for more than b times the even share, then distinct last codes. Collisions: items that need the de-duplication
level. Left over: squared length after level 3. Pairs of consecutive items: *training* pairs are those that behaviour embeddings were made
from, so only *validation* pairs (last training event, validation event; never a test event) compare embeddings. Share 1, 2: pairs with
the same first code, first two codes, in brackets as a multiple of chance. MI: mutual information of the first codes (of the first two)
in bits, less its value after shuffling. Bits: cross-entropy of the validation item under a bigram model over codes, counted on training
pairs with back-off; lower is better, and it is comparable between rows because it is the probability of the item, not of a code.
Without: the same model without the item before, which hardly depends on the IDs. One seed a row."""


@dataclass(frozen=True)
class Setting:
    """One row: behaviour alone without an ``encoder``, text alone without a ``weight``."""

    encoder: str | None
    weight: float | None
    balance: float | None
    distinct: bool

    @property
    def embedding(self) -> str:
        if self.encoder is None:
            return "behaviour"
        return self.encoder if self.weight is None else f"{self.encoder} + behaviour"

    @property
    def assignment(self) -> str:
        if self.balance is not None:
            return f"balance {self.balance:g}"
        return "distinct" if self.distinct else NEAREST


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", required=True, help="prepared datasets of the workspace")
    parser.add_argument("--encoders", nargs="+", default=["tfidf", "wordllama"], help="text encoders; minilm takes minutes on a CPU")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0], help="behaviour weights")
    parser.add_argument("--balance", type=float, nargs="*", default=[2.0, 1.0], help="capacities, in even shares")
    parser.add_argument("--text-columns", nargs="*", default=[], help="text columns to read; default: all")
    parser.add_argument("--cache", type=Path, required=True, help="directory for embeddings and finished rows")
    parser.add_argument("--name", default="semantic_ids", help="name of the report")
    parser.add_argument("--directory", type=Path, default=RESULTS, help="where the report goes")
    arguments = parser.parse_args()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.datasets:
        dataset = PreparedDataset.open(workspace.dataset_dir(name))
        columns = tuple(column for column in arguments.text_columns if column in dataset.manifest.text_columns)
        measured = Measured(dataset, columns, arguments.cache)
        for setting in settings_of(arguments.encoders, arguments.weights, arguments.balance):
            rows.append({"dataset": name, **measured.row(setting)})
    columns_read = f"Text columns: {', '.join(arguments.text_columns) or 'all'}."
    command = "python " + shlex.join(sys.argv)
    print(write_report(arguments.name, rows, command, f"{NOTES} {columns_read}", directory=arguments.directory))


def settings_of(encoders: list[str], weights: list[float], balances: list[float]) -> Iterator[Setting]:
    """Each embedding with the nearest codes and with the first capacity; with the other ones for the first encoder at weight 1."""
    for encoder, weight in [*((encoder, weight) for encoder in encoders for weight in (None, *weights)), (None, None)]:
        yield Setting(encoder, weight, None, False)
        if (encoder, weight) == (encoders[0], 1.0):
            yield Setting(encoder, weight, None, True)
            yield from (Setting(encoder, weight, balance, True) for balance in balances)
        elif balances:
            yield Setting(encoder, weight, balances[0], True)


class Measured:
    """The rows of one dataset; embeddings and finished rows are kept in files."""

    def __init__(self, dataset: PreparedDataset, columns: tuple[str, ...], cache: Path) -> None:
        self.dataset, self.columns, self.cache = dataset, columns, cache
        self.training, self.validation = read_transitions(dataset)
        # another preparation or other columns are other embeddings
        self.key = f"{dataset.manifest.name}-{dataset.manifest.content_hash[:12]}-{'+'.join(columns) or 'all'}"

    def row(self, setting: Setting) -> dict[str, Any]:
        path = self.cache / f"{self.key}-{setting}.json"
        if not path.exists():
            row = self._measure(setting)
            path.write_text(json.dumps(row), encoding="utf-8")
            print(self.key, row, flush=True)
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _measure(self, setting: Setting) -> dict[str, Any]:
        codes, widths, energy = self._codes(setting)
        report = quality_report(SemanticIdTable(torch.from_numpy(codes), widths), source="", residual_energy=energy)
        groups = prefix_groups(codes)
        shares = [shared_fraction(self.validation, groups[level]) for level in (1, 2)]
        bits, without = held_out_bits(codes, self.training, self.validation)
        return {
            "embedding": setting.embedding,
            "weight": setting.weight,
            "assignment": setting.assignment,
            "entropy 1 / 2 / 3 (bits)": " / ".join(f"{level['entropy_bits']:.2f}" for level in report["levels"][:3]),
            "collisions": f"{report['before_dedup']['fraction_sharing']:.1%}",
            "left over": f"{energy[-1]:.1%}",
            "share 1": f"{shares[0][0]:.2%} ({shares[0][0] / shares[0][1]:.1f}x)",
            "share 2": f"{shares[1][0]:.2%} ({shares[1][0] / shares[1][1]:.0f}x)",
            "MI 1 (bits)": round(mutual_information(self.validation, groups[1]), 3),
            "MI 1, training": round(mutual_information(self.training, groups[1]), 3),
            "MI 2, training": round(mutual_information(self.training, groups[2]), 3),
            "bits": round(bits, 3),
            "bits without": round(without, 3),
        }

    def _codes(self, setting: Setting) -> tuple[NDArray[np.int64], tuple[int, ...], list[float]]:
        config = SemanticIdConfig()
        embeddings = self._embeddings(setting)
        width = default_codebook_width(len(embeddings), config.min_codebook_width)
        quantizer = ResidualQuantizer.fit(
            embeddings, num_levels=3, width=width, iterations=config.kmeans_iterations, seed=config.seed, balance=setting.balance
        )
        prefixes = quantizer.encode_together(embeddings, balance=setting.balance, distinct_last_code=setting.distinct)
        # as wide as needed: bits compare only where no two items share an ID
        slots = dedup_slots(prefixes, len(prefixes))
        widths = (width, width, width, max(int(slots.max()) + 1, config.dedup_width))
        return np.column_stack([prefixes, slots]), widths, quantizer.residual_energy(embeddings, prefixes)

    def _embeddings(self, setting: Setting) -> NDArray[np.float32]:
        if setting.encoder is None:
            return self._part(None)
        text = self._part(setting.encoder)
        return text if setting.weight is None else np.concatenate([text, np.float32(setting.weight) * self._part(None)], axis=1)

    def _part(self, encoder: Any) -> NDArray[np.float32]:
        path = self.cache / f"{self.key}-{encoder or 'behaviour'}.npy"
        if not path.exists():
            config = SemanticIdConfig(embedding="behaviour")
            if encoder is not None:
                config = SemanticIdConfig(text_encoder=encoder, text_columns=self.columns)
            np.save(path, fit_embedder(self.dataset, config).embed(self.dataset))
        found: NDArray[np.float32] = np.load(path)
        return found


if __name__ == "__main__":
    main()
