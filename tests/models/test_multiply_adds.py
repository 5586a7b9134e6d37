"""The counted cost of a sample is what the model really multiplies."""

import dataclasses
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import (
    BatchSizes,
    DecoderConfig,
    Direction,
    EmbeddingConfig,
    EncoderConfig,
    ModelConfig,
    StreamConfig,
    forward_multiply_adds,
    multiply_adds,
    with_sample_costs,
)
from gbla_rec.models.retriever import HistoryModel

WIDTHS = (32, 64, 16)


class Values:
    def __init__(self, values: torch.Tensor) -> None:
        self._values = values

    def values(self) -> torch.Tensor:
        return self._values


def measured(config: ModelConfig, num_events: int, num_targets: int) -> float:
    """Multiply-adds of a forward pass over one sample, as torch counts them."""
    features = ["one", "two"]
    num_rows = {"one": num_events if config.embedding.reads_item_ids else 0, "two": num_events}
    model = HistoryModel(config, features, torch.zeros(9, len(WIDTHS), dtype=torch.int64), WIDTHS, Backend.REFERENCE).eval()
    layout = JaggedLayout.from_lengths([num_events * config.embedding.tokens_per_event(len(WIDTHS))])
    embedded: dict[str, Any] = {name: Values(torch.randn(num_rows[name], config.embedding.dim)) for name in features}
    codes = torch.zeros(num_targets, len(WIDTHS), dtype=torch.int64)
    # the fused kernel of the CPU is not counted, the plain one is
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        memory = model.encode(embedded, torch.zeros(num_events, dtype=torch.int64), layout).memory
        model.decoder(codes, JaggedLayout.from_lengths([num_targets * len(WIDTHS)]), memory)
    return counter.get_total_flops() / 2


@pytest.mark.parametrize(("pattern", "output_gate", "num_layers"), [("S", True, 1), ("G", False, 4), ("SGG", True, 1)])
def test_multiply_adds_are_those_that_torch_counts(pattern: str, output_gate: bool, num_layers: int) -> None:
    # 64 heads: no column of the fused projection is padding
    encoder = EncoderConfig(model_dim=128, num_heads=64, pattern=pattern, ffn_dim=192, conv=False, output_gate=output_gate)
    embedding = EmbeddingConfig(dim=24, semantic_code_dim=8)
    config = ModelConfig(embedding=embedding, encoder=encoder, decoder=DecoderConfig(num_heads=4, ffn_dim=96, num_layers=num_layers))
    counted = multiply_adds(config, WIDTHS, 1_000)
    for num_events, num_targets in ((1, 1), (300, 1), (37, 8)):
        assert counted.of(num_events, num_targets) == pytest.approx(measured(config, num_events, num_targets), rel=0.01)


@pytest.mark.parametrize("pattern", ["S", "SG"])
def test_codes_that_are_tokens_count_as_torch_counts_them(pattern: str) -> None:
    encoder = EncoderConfig(model_dim=128, num_heads=64, pattern=pattern, ffn_dim=192, conv=False)
    # the first table is not looked up, the second one is the context's
    embedding = EmbeddingConfig(dim=24, tokens="codes", context_features=("two",))
    config = ModelConfig(embedding=embedding, encoder=encoder, decoder=DecoderConfig(num_heads=4, ffn_dim=96, num_layers=2))
    counted = multiply_adds(config, WIDTHS, 1_000)
    for num_events, num_targets in ((1, 1), (100, 1), (37, 8)):
        assert counted.of(num_events, num_targets) == pytest.approx(measured(config, num_events, num_targets), rel=0.01)
    # three tokens for an event, nine pairs for a pair
    codes, items = (dataclasses.replace(config, embedding=EmbeddingConfig(tokens=tokens)) for tokens in ("codes", "items"))
    assert multiply_adds(codes, WIDTHS, 1_000).pair == 9 * multiply_adds(items, WIDTHS, 1_000).pair > 0


def test_a_window_counts_tokens_whatever_an_event_has_of_them() -> None:
    encoder = EncoderConfig(model_dim=64, pattern="W", window=100)
    config = ModelConfig(encoder=encoder, embedding=EmbeddingConfig(tokens="codes"))
    seen_whole, beyond = multiply_adds(config, WIDTHS, 33), multiply_adds(config, WIDTHS, 34)
    assert seen_whole.pair == 9 * 2 * 64 and beyond.pair == 0
    assert beyond.event - seen_whole.event == 3 * 2 * 64 * 201


def test_a_window_costs_by_events_unless_it_sees_every_history_whole() -> None:
    config = ModelConfig(encoder=EncoderConfig(model_dim=64, pattern="W", window=100))
    long, short = multiply_adds(config, WIDTHS, 5_000), multiply_adds(config, WIDTHS, 101)
    assert long.pair == 0 and short.pair == 2 * 64
    # at a length far above the window the count is that of the pairs in it
    assert long.event - short.event == 2 * 64 * 201


@pytest.mark.parametrize("pattern", ["S", "G", "SGW"])
@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_the_cost_of_a_sample_is_the_count_of_a_batch_that_holds_it(pattern: str, direction: Direction) -> None:
    config = ModelConfig(encoder=EncoderConfig(model_dim=64, pattern=pattern, direction=direction, window=1_000))
    codes = len(WIDTHS) * 3
    sizes = BatchSizes(tokens=500, pairs=500**2, window_pairs=500**2, targets=3, memory_pairs=codes * 500)
    counts = forward_multiply_adds(config, WIDTHS, sizes)
    assert multiply_adds(config, WIDTHS, 1_000).of(500, 3) == sum(counts.values())
    # a causal layer computes scores of half of the pairs, linear attention too
    by_pairs = {letter: counts[letter] - _without_pairs(config, sizes)[letter] for letter in config.encoder.layers}
    each = {"bidirectional": {"S": 2, "W": 2, "G": 0}, "causal": {"S": 1, "W": 1, "G": 1}}[direction]
    assert by_pairs == {letter: each[letter] * 64 * 500**2 for letter in config.encoder.layers}


def _without_pairs(config: ModelConfig, sizes: BatchSizes) -> dict[str, int]:
    return forward_multiply_adds(config, WIDTHS, dataclasses.replace(sizes, pairs=0, window_pairs=0))


def test_stated_costs_stay_and_others_follow_the_pattern() -> None:
    stated = StreamConfig(linear_cost=3.0, quadratic_cost=0.5)
    assert with_sample_costs(stated, ModelConfig(), WIDTHS) is stated
    shares = []
    for pattern in ("GGG", "SGG", "SSG", "SSS"):
        stream = with_sample_costs(StreamConfig(), ModelConfig(encoder=EncoderConfig(pattern=pattern)), WIDTHS)
        assert stream.linear_cost and stream.quadratic_cost is not None and stream.target_cost
        shares.append(stream.quadratic_cost / stream.linear_cost)
    assert shares[0] == 0 and shares == sorted(shares) and len(set(shares)) == 4


@pytest.mark.parametrize("costs", [{"linear_cost": 1.0}, {"target_cost": 1.0}, {"linear_cost": -1.0, "quadratic_cost": 0.0}])
def test_half_stated_or_negative_costs_are_refused(costs: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="StreamConfig"):
        dataclasses.replace(StreamConfig(), **costs)
