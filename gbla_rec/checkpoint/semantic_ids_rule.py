"""A run is read only with the semantic IDs that it was trained on: its decoder writes their codes."""

from pathlib import Path

from gbla_rec.checkpoint.run_directory import read_semantic_ids_hash
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
