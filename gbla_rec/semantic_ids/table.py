"""The table of semantic IDs: which codes each item has, on disk and in memory.

A directory of semantic IDs::

    table.parquet        item_id, item_index, code_0 .. code_{C - 1}; the last code tells apart items of one prefix
    centroids_0.npy ..   (codes used, D) fp32: the frozen codebooks
    embedding.json, embedding_*       what embeds a new item the same way
    item_features.npy    (N, F) fp32: the embeddings, each of length 1 or zero, in item order
    semantic_ids.json    widths, settings, the dataset's hash, and the SHA-256 of every other file
    report.json, report.md            quality
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from gbla_rec.data.new_directory import new_directory
from gbla_rec.semantic_ids.trie import check_codes

SCHEMA_VERSION = 1
MANIFEST_FILE = "semantic_ids.json"
TABLE_FILE = "table.parquet"
RETOKENIZE = "delete the directory and make it anew with: gbla-rec tokenize"


@dataclass(frozen=True, eq=False)
class SemanticIdTable:
    """Semantic IDs of all items of a dataset.

    Attributes:
        codes: ``(N, C)`` int64, row ``i`` belongs to item index ``i``; the last level tells apart items of one prefix.
        widths: codebook width of each of the ``C`` levels; appending items never changes them.
        item_ids: the ``N`` item ids, int64 or string; None: the ids are the indices.
    """

    codes: Tensor
    widths: tuple[int, ...]
    item_ids: pl.Series | None = None

    def __post_init__(self) -> None:
        check_codes(self.codes, self.widths)
        if self.item_ids is not None and len(self.item_ids) != len(self.codes):
            raise ValueError(f"item_ids must name each of the {len(self.codes)} rows of codes, got {len(self.item_ids)} ids")

    @property
    def num_items(self) -> int:
        """``N``."""
        return self.codes.shape[0]

    @property
    def num_levels(self) -> int:
        """``C``, the de-duplication level included."""
        return self.codes.shape[1]

    @property
    def content_hash(self) -> str:
        """SHA-256 over widths, item ids and codes: equal exactly when the tables are, whatever file they came from."""
        digest = hashlib.sha256(json.dumps([list(self.widths), self.num_items]).encode())
        digest.update(self.codes.cpu().numpy().astype("<i8", copy=False).tobytes())
        ids = self._ids().cast(pl.String)
        digest.update(ids.str.len_bytes().to_numpy().astype("<i8").tobytes())
        digest.update("".join(ids.to_list()).encode())
        return digest.hexdigest()

    def to_frame(self) -> pl.DataFrame:
        """The table as written to ``table.parquet``."""
        codes = self.codes.cpu().numpy()
        columns = {f"code_{level}": codes[:, level] for level in range(self.num_levels)}
        return pl.DataFrame({"item_id": self._ids(), "item_index": np.arange(self.num_items), **columns})

    def save(self, directory: Path, *, dataset_hash: str | None = None, config: dict[str, Any] | None = None) -> None:
        """Write the table into the new directory ``directory``, all or nothing.

        Raises:
            FileExistsError: if ``directory`` exists.
        """
        with new_directory(directory) as temporary:
            self.write_files(temporary, dataset_hash=dataset_hash, config=config)

    def write_files(
        self, directory: Path, *, dataset_hash: str | None, config: dict[str, Any] | None, lineage: Mapping[str, Any] | None = None
    ) -> None:
        """Write ``table.parquet``, then ``semantic_ids.json`` with the hashes of all files that ``directory`` holds by now.

        Args:
            directory: to write into.
            dataset_hash: content hash of the dataset.
            config: the settings of the semantic IDs.
            lineage: further entries of the manifest, about the published IDs that these extend.
        """
        self.to_frame().write_parquet(directory / TABLE_FILE)
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "num_items": self.num_items,
            "widths": list(self.widths),
            "content_hash": self.content_hash,
            "dataset_hash": dataset_hash,
            "config": config,
            **(lineage or {}),
            "files": {path.name: file_hash(path) for path in sorted(directory.iterdir()) if not path.name.startswith(".")},
        }
        (directory / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2, default=str) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path, *, num_items: int | None = None, dataset_hash: str | None = None) -> "SemanticIdTable":
        """Read the table of ``directory`` and prove it whole.

        Args:
            directory: what ``tokenize``, ``append_items`` or ``save`` wrote.
            num_items: if given, the number of items that the dataset in use has.
            dataset_hash: if given, the content hash of the dataset in use.

        Raises:
            FileNotFoundError: if there are no semantic IDs.
            ValueError: if a file was changed or is missing, or the table belongs to another dataset.
        """
        manifest = read_manifest(directory)
        if num_items is not None and num_items != manifest["num_items"]:
            raise ValueError(
                f"{directory}: the semantic IDs cover {manifest['num_items']} items but the dataset has {num_items}; "
                f"{RETOKENIZE}, or keep the published IDs and add the new items with gbla_rec.semantic_ids.tokenize.append_items"
            )
        if dataset_hash is not None and dataset_hash != manifest["dataset_hash"]:
            raise ValueError(
                f"{directory}: the semantic IDs were made from a dataset with content hash {manifest['dataset_hash']}, "
                f"this one has {dataset_hash}: it was prepared anew. Runs trained on these IDs need that earlier dataset; for new runs, "
                f"{RETOKENIZE}"
            )
        frame = pl.read_parquet(directory / TABLE_FILE)
        names = [f"code_{level}" for level in range(len(manifest["widths"]))]
        if frame.columns != ["item_id", "item_index", *names] or not np.array_equal(frame["item_index"], np.arange(len(frame))):
            raise ValueError(f"{directory / TABLE_FILE}: the columns must be item_id, item_index = 0, 1, .. and {names}; {RETOKENIZE}")
        codes = torch.from_numpy(np.ascontiguousarray(frame.select(names).to_numpy().astype(np.int64)))
        return cls(codes.reshape(len(frame), len(names)), tuple(manifest["widths"]), frame["item_id"])

    def _ids(self) -> pl.Series:
        return self.item_ids.rename("item_id") if self.item_ids is not None else pl.Series("item_id", np.arange(self.num_items))


def read_manifest(directory: Path) -> dict[str, Any]:
    """``semantic_ids.json`` of ``directory``, after checking the hash of every file that it names.

    Raises:
        FileNotFoundError: if there are no semantic IDs in ``directory``.
        ValueError: if they come from a newer version, or a file is missing or was changed.
    """
    path = directory / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no semantic IDs in {directory} ({MANIFEST_FILE} is missing); make them with: gbla-rec tokenize --dataset {directory.name}, "
            "and the --recipe and --semantic-ids options of the training"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); {RETOKENIZE}") from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise ValueError(f"{path}: schema_version must be {SCHEMA_VERSION}, got {found}; upgrade gbla-rec, or {RETOKENIZE}")
    for name, expected in manifest["files"].items():
        file = directory / name
        if not file.is_file():
            raise ValueError(f"{file} is missing; {RETOKENIZE}")
        if file_hash(file) != expected:
            raise ValueError(f"{file} was changed after it was written (its SHA-256 differs from {MANIFEST_FILE}); {RETOKENIZE}")
    return manifest


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
