"""What a whole run's config says about its batches."""

import pytest

from gbla_rec.config import ItemHeadConfig, ModelConfig, RunConfig, StreamConfig


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
