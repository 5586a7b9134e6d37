"""A run is read only with the semantic IDs that it was trained on: its decoder writes their codes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gbla_rec.checkpoint.run_directory import read_semantic_ids_hash
from gbla_rec.config import RunConfig, SemanticIdConfig, to_json
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity

SHOWN = 12
"""Digits of a hash in a message."""


def require_semantic_ids(run_dir: Path, identity: SemanticIdsIdentity) -> None:
    """Refuse other semantic IDs than the run's; those that extend them pass, and all do for a run that does not say which it has.

    Raises:
        ValueError: if they are others, or the run's ``version.json`` is damaged.
    """
    wanted = read_semantic_ids_hash(run_dir)
    if not identity.covers(wanted):
        assert wanted is not None
        raise ValueError(
            f"the semantic IDs in {identity.directory} must be those that {run_dir} was trained on, which have semantic_ids_hash "
            f"{wanted[:SHOWN]}.. (version.json), got {identity.content[:SHOWN]}..: they were made anew. Restore {identity.directory} "
            "from a copy (or remove it and make the same IDs again with: gbla-rec tokenize), or train a new run on the present "
            "ones, without --resume"
        )


def require_settings(ids_dir: Path, manifest: Mapping[str, Any], config: RunConfig) -> None:
    """Refuse semantic IDs that were made otherwise than the run's config says; IDs without settings (made elsewhere) pass.

    Args:
        ids_dir: where they are, for the message.
        manifest: of the semantic IDs; ``embedding`` is what ``auto`` chose.
        config: of the run.

    Raises:
        ValueError: with the options that would fit.
    """
    made_with = manifest["config"]
    wanted = json.loads(to_json(config.semantic_ids))
    if made_with is not None:
        # a setting younger than the IDs: they were made as its default says
        made_with = json.loads(to_json(SemanticIdConfig())) | made_with
        if wanted["embedding"] == "auto" and made_with["embedding"] in ("text", "behaviour"):
            wanted["embedding"] = made_with["embedding"]
        differing = sorted(name for name in wanted if made_with[name] != wanted[name])
        if differing:
            options = " ".join(f"--semantic-ids.{name.replace('_', '-')} {made_with[name]}" for name in differing)
            raise ValueError(
                f"the semantic IDs in {ids_dir} were made with other settings than this run's semantic_ids; train with {options}, "
                f"or remove {ids_dir} and tokenize with this run's options"
            )
