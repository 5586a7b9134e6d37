"""Ranks share a global batch evenly, by what its samples cost the model."""

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.config import EncoderConfig, ModelConfig, StreamConfig, multiply_adds, with_sample_costs
from gbla_rec.data.histories import sample_costs, split_by_cost
from gbla_rec.data.stream import TrainingStream

WIDTHS = (256, 256, 256, 256)
TOKENS_PER_RANK = 65_536


@given(costs=st.lists(st.floats(0, 1e12), min_size=1, max_size=40), world_size=st.integers(1, 6))
def test_no_rank_could_shed_its_last_sample_and_gain(costs: list[float], world_size: int) -> None:
    ranks = split_by_cost(np.array(costs), world_size)
    loads = np.bincount(ranks, weights=costs, minlength=world_size)
    assert ranks.min() >= 0
    assert ranks.max() < world_size
    assert loads.max() - loads.min() <= max(costs) * (1 + 1e-9)
    if len(costs) <= world_size:
        assert len(set(ranks.tolist())) == len(costs)


def zipf_lengths(seed: int, num_tokens: int, longest: int) -> np.ndarray:
    """Lengths with P(T) ~ T^-1.5 up to ``longest``, together ``num_tokens`` or a little less."""
    lengths = np.floor((1 - np.random.default_rng(seed).random(num_tokens) * (1 - longest**-0.5)) ** -2).astype(np.int64)
    return lengths[np.cumsum(lengths) <= num_tokens]


@given(
    seed=st.integers(0, 10**6),
    pattern=st.sampled_from(["S", "SGG", "GGG", "SSS"]),
    world_size=st.sampled_from([8, 64]),
    model_dim=st.sampled_from([64, 512]),
)
def test_zipf_lengths_are_balanced_to_a_hundredth(seed: int, pattern: str, world_size: int, model_dim: int) -> None:
    model = ModelConfig(encoder=EncoderConfig(model_dim=model_dim, pattern=pattern))
    stream = with_sample_costs(StreamConfig(max_history_length=8_192), model, WIDTHS)
    assert stream.linear_cost is not None and stream.quadratic_cost is not None and stream.target_cost is not None
    lengths = zipf_lengths(seed, world_size * TOKENS_PER_RANK, 8_192)
    targets = np.minimum(lengths, 32)
    costs = sample_costs(lengths, targets, stream)
    loads = np.bincount(split_by_cost(costs, world_size), weights=costs, minlength=world_size)
    # no division does better than this
    bound = max(costs.max(), costs.sum() / world_size)
    assert loads.max() <= 1.01 * bound
    # the costs are those of the model
    counted = multiply_adds(model, WIDTHS, 8_192)
    exact = sum(counted.of(int(events), int(count)) for events, count in zip(lengths, targets, strict=True))
    assert costs.sum() == pytest.approx(exact, rel=0.03)


def test_the_stream_deals_by_cost_and_not_by_tokens(prepare_frame: Callable[..., object]) -> None:
    # one long history beside many short ones, as many events in both halves
    lengths = [400] + [22] * 20
    items = [[1000 * user + event for event in range(length)] for user, length in enumerate(lengths)]
    data = prepare_frame(pl.DataFrame({"user_id": range(len(lengths)), "items": items}), sequence_column="items")

    def tokens(**costs: float) -> list[int]:
        config = StreamConfig(tokens_per_batch=10_000, targets_per_cut=1000, max_cuts_per_history=1, min_history_length=10, **costs)
        streams = [TrainingStream(data, config, seed=1, rank=rank, world_size=2) for rank in range(2)]  # type: ignore[arg-type]
        return [len(next(stream.batches()).items) for stream in streams]

    by_tokens, by_pairs = tokens(linear_cost=1.0, quadratic_cost=0.0), tokens(linear_cost=0.0, quadratic_cost=1.0)
    assert abs(by_tokens[0] - by_tokens[1]) < 30
    # the longest history alone costs more than all others together
    assert by_pairs[0] > 100 and by_tokens != by_pairs
    by_targets = tokens(linear_cost=0.0, quadratic_cost=0.0, target_cost=1.0)
    assert by_targets not in (by_tokens, by_pairs)
