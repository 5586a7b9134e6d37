"""What a whole run's config says about its batches."""

import pytest

from gbla_rec.config import ItemHeadConfig, ModelConfig, RunConfig, StreamConfig


@pytest.mark.parametrize(
    ("objective", "head", "expected"),
    [
        ("generative", ItemHeadConfig(), 1_000),
        # 4 ranks look up the catalogue each
        ("joint", ItemHeadConfig(), 1_000 + 4 * 70),
        # items asked for, and one set of negatives a rank
        ("joint", ItemHeadConfig(num_sampled=9), 1_000 + 1_000 + 4 * 9),
        # negatives of each item asked for
        ("item", ItemHeadConfig(loss="bce", num_sampled=2), 1_000 + 1_000 * 3),
    ],
)
def test_a_batch_looks_up_its_events_and_the_candidates_of_every_rank(objective, head, expected) -> None:  # type: ignore[no-untyped-def]
    model = ModelConfig(objective=objective, item_head=head)
    config = RunConfig(name="a", dataset="a", model=model, stream=StreamConfig(tokens_per_batch=1_000))
    assert config.lookups_per_batch(num_items=70, world_size=4) == expected
