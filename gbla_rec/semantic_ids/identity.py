"""Which semantic IDs a run was trained on: hashes that tell them from others made with the same settings."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gbla_rec.semantic_ids.features import FEATURES_FILE

EXTENDS = "extends"
"""Manifest entry: the published IDs that these keep and add items to, each as ``generation`` describes it."""


@dataclass(frozen=True)
class SemanticIdsIdentity:
    """What of a directory of semantic IDs a model reads.

    Attributes:
        directory: of the semantic IDs.
        content: SHA-256, hexadecimal, of the table, and of the item features if the model reads them.
        extends: the same of the published IDs that these keep unchanged.
    """

    directory: Path
    content: str
    extends: tuple[str, ...] = ()

    @classmethod
    def of(cls, directory: Path, manifest: Mapping[str, Any], *, with_features: bool) -> "SemanticIdsIdentity":
        """The identity of the IDs in ``directory``.

        Args:
            directory: of the semantic IDs.
            manifest: what ``read_manifest(directory)`` gave.
            with_features: whether the model reads item features.
        """
        known = [generation(manifest), *manifest.get(EXTENDS, [])]
        content, *extends = [_hash(entry, with_features) for entry in known]
        return cls(directory, content, tuple(extends))

    def covers(self, trained_on: str | None) -> bool:
        """Whether a run trained on these: on just these, on IDs that these extend, or on None, unknown ones."""
        return trained_on is None or trained_on in (self.content, *self.extends)


def generation(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Hashes of the table and of the item features that a manifest describes."""
    return {"content_hash": manifest["content_hash"], "item_features": manifest["files"].get(FEATURES_FILE)}


def _hash(entry: Mapping[str, str | None], with_features: bool) -> str:
    parts = [str(entry["content_hash"]), *([str(entry["item_features"])] if with_features else [])]
    return hashlib.sha256(" ".join(parts).encode()).hexdigest() if with_features else parts[0]
