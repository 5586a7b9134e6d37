"""What a whole run's config says about its batches."""

import copy
import functools
import json

import pytest

from gbla_rec.config import ItemHeadConfig, ModelConfig, RunConfig, StreamConfig, to_json, with_defaults


@pytest.mark.parametrize(
    ("objective", "head", "shared", "of_every_rank"),
    [
        ("generative", ItemHeadConfig(), 1_000, 0),
        # every rank looks up the catalogue
        ("joint", ItemHeadConfig(), 1_000, 70),
        # items asked for, and one set of negatives a rank
        ("joint", ItemHeadConfig(num_sampled=9), 1_000 + 1_000, 9),
        # negatives of each item asked for
        ("item", ItemHeadConfig(loss="bce", num_sampled=2), 1_000 + 1_000 * 3, 0),
    ],
)
def test_a_batch_looks_up_its_events_and_the_candidates_of_every_rank(objective, head, shared, of_every_rank) -> None:  # type: ignore[no-untyped-def]
    model = ModelConfig(objective=objective, item_head=head)
    config = RunConfig(name="a", dataset="a", model=model, stream=StreamConfig(tokens_per_batch=1_000))
    assert config.lookups_per_batch == shared and config.candidates_per_rank(70) == of_every_rank


@pytest.mark.parametrize("absent", ["seed", "stream.exclude_evaluated", "model.encoder", "model.item_head.loss", "optimizer"])
def test_what_an_earlier_version_did_not_save_has_its_default(absent: str) -> None:
    saved = json.loads(to_json(RunConfig(name="a", dataset="b")))
    earlier = copy.deepcopy(saved)
    *parents, name = absent.split(".")
    functools.reduce(dict.__getitem__, parents, earlier).pop(name)
    earlier["stream"]["of_another_version"] = 1
    completed = with_defaults(RunConfig, earlier)
    assert completed["stream"].pop("of_another_version") == 1
    assert completed == saved
    assert with_defaults(RunConfig, {**saved, "seed": 3})["seed"] == 3
