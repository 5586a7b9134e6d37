"""The identity of semantic IDs: a run on published IDs is covered by what extends them, and by nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gbla_rec.config import SemanticIdConfig
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity
from gbla_rec.semantic_ids.table import read_manifest
from gbla_rec.semantic_ids.tokenize import append_items, tokenize

MakeDataset = Callable[..., Any]


@pytest.fixture
def generations(make_dataset: MakeDataset, tmp_path: Path) -> list[Path]:
    """Published IDs, extended twice."""
    paths = [tmp_path / name for name in ("first", "second", "third")]
    for place, path in enumerate(paths):
        dataset, vectors = make_dataset(list(range(7 + place))), tmp_path / f"{place}.npy"
        np.save(vectors, np.random.default_rng(0).standard_normal((7 + place, 5)))
        if place == 0:
            settings = {"num_levels": 2, "codebook_width": 4, "dedup_width": 3, "kmeans_iterations": 4}
            tokenize(dataset, SemanticIdConfig(embedding="file", embedding_file=vectors, **settings), path)
        else:
            append_items(paths[place - 1], dataset, path, embedding_file=vectors)
    return paths


@pytest.mark.parametrize("with_features", [False, True])
def test_ids_cover_the_runs_of_earlier_generations_and_no_others(generations: list[Path], with_features: bool) -> None:
    found = [SemanticIdsIdentity.of(path, read_manifest(path), with_features=with_features) for path in generations]
    covered = [[identity.covers(run.content) for run in found] for identity in found]
    assert covered == [[True, False, False], [True, True, False], [True, True, True]]
    assert not found[2].covers("other") and found[0].covers(None)
    other = [SemanticIdsIdentity.of(path, read_manifest(path), with_features=not with_features) for path in generations]
    assert not any(identity.covers(run.content) for identity in found for run in other)
