"""The count of model FLOPs is that of torch's own counter on the reference backend, forward and backward."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ItemHeadConfig, ModelConfig, forward_multiply_adds
from gbla_rec.data.item_queries import ItemQueries
from gbla_rec.models.layers import PROJECTION_MULTIPLE
from gbla_rec.models.retriever import HistoryModel
from gbla_rec.training import model_flops
from gbla_rec.training.model_flops import batch_sizes, peak_flops, training_flops

WIDTHS, TABLE_DIM, DIM, HEADS = (16, 8, 4), 8, 64, 4
LENGTHS, TARGETS = [3, 70, 2, 200], [2, 1, 0, 5]


def counted(config: ModelConfig) -> int:
    torch.manual_seed(0)
    codes = torch.stack([torch.randint(0, width, (50,)) for width in WIDTHS], dim=1)
    model = HistoryModel(config, ["a", "b"], codes, WIDTHS, Backend.REFERENCE)
    layout = JaggedLayout.from_lengths(LENGTHS)
    code_layout = JaggedLayout.from_lengths([len(WIDTHS) * count for count in TARGETS])
    rows = [torch.randn(sum(LENGTHS), TABLE_DIM, requires_grad=True) for _ in range(2)]
    items, targets = torch.randint(0, 50, (sum(LENGTHS),)), torch.randint(0, 50, (sum(TARGETS),))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.target_nll(rows, items, items, targets, targets, layout, code_layout).sum().backward()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("pattern", "num_repeats"), [("SGG", 1), ("S", 2)])
def test_the_count_is_that_of_the_products(pattern: str, num_repeats: int) -> None:
    config = ModelConfig(
        embedding=EmbeddingConfig(dim=TABLE_DIM, semantic_code_dim=4),
        encoder=EncoderConfig(model_dim=DIM, num_heads=HEADS, pattern=pattern, num_repeats=num_repeats, ffn_dim=96),
        decoder=DecoderConfig(num_heads=HEADS, ffn_dim=80, num_layers=num_repeats),
    )
    code_layout = JaggedLayout.from_lengths([len(WIDTHS) * count for count in TARGETS])
    sizes = batch_sizes(JaggedLayout.from_lengths(LENGTHS), code_layout, sum(TARGETS), config.encoder.window)
    padding = -(4 * DIM + HEADS) % PROJECTION_MULTIPLE
    padded = 3 * 2 * sizes.tokens * DIM * padding * config.encoder.layers.count("G")
    assert training_flops(config, WIDTHS, sizes) == pytest.approx(counted(config) - padded, rel=1e-6)


@pytest.mark.parametrize(
    ("head", "num_candidates", "num_scores", "uncounted"),
    [
        (ItemHeadConfig(), 50, 8 * 50, 0),
        # the product with the item asked for is a sum, which torch's counter does not know
        (ItemHeadConfig(num_sampled=20), 8 + 20, 8 * (1 + 20), 8),
        (ItemHeadConfig(loss="bce", num_sampled=3), 8 * (1 + 3), 8 * (1 + 3), 8),
    ],
)
def test_the_count_of_the_item_level_head_is_that_of_its_products(
    head: ItemHeadConfig, num_candidates: int, num_scores: int, uncounted: int
) -> None:
    config = ModelConfig(
        embedding=EmbeddingConfig(dim=TABLE_DIM, semantic_code_dim=4),
        encoder=EncoderConfig(model_dim=DIM, num_heads=HEADS, pattern="S", ffn_dim=96),
        objective="item",
        item_head=head,
    )
    num_targets = sum(TARGETS)
    shared = head.num_sampled if head.loss == "softmax" else 0
    places = torch.arange(num_targets)
    queries = ItemQueries(places, places, torch.randint(0, 50, (num_candidates,)), torch.zeros(shared))
    assert queries.num_scores(head.loss) == num_scores
    model = HistoryModel(config, ["a", "b"], torch.zeros(50, len(WIDTHS), dtype=torch.int64), WIDTHS, Backend.REFERENCE)
    layout, code_layout = (JaggedLayout.from_lengths(rows) for rows in (LENGTHS, [len(WIDTHS) * count for count in TARGETS]))
    rows = [torch.randn(sum(LENGTHS) + num_candidates, TABLE_DIM, requires_grad=True) for _ in range(2)]
    items, targets = torch.randint(0, 50, (sum(LENGTHS),)), torch.randint(0, 50, (num_targets,))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.target_nll(rows, items, items, targets, targets, layout, code_layout, queries).sum().backward()
    sizes = batch_sizes(
        layout,
        code_layout,
        num_targets,
        config.encoder.window,
        num_queries=num_targets,
        num_candidates=num_candidates,
        num_scores=queries.num_scores(head.loss),
    )
    assert training_flops(config, WIDTHS, sizes) - 3 * 2 * uncounted * DIM == counter.get_total_flops()


def test_a_window_counts_the_pairs_that_it_sees() -> None:
    lengths, window = [1, 5, 0, 9, 3], 3
    layout = JaggedLayout.from_lengths(lengths)
    seen = sum(abs(i - j) <= window for length in lengths for i in range(length) for j in range(length))
    assert batch_sizes(layout, layout, 0, window).window_pairs == seen


def test_only_softmax_attention_grows_with_the_square_of_the_length() -> None:
    encoder = EncoderConfig(model_dim=DIM, num_heads=HEADS, pattern="SGW", window=4, ffn_dim=96)
    config = dataclasses.replace(ModelConfig(), encoder=encoder)
    one, four = (
        forward_multiply_adds(config, WIDTHS, batch_sizes(layout, layout, 0, 4))
        for layout in (JaggedLayout.from_lengths([1000] * 4), JaggedLayout.from_lengths([4000]))
    )
    assert one["G"] == four["G"] and one["ffn"] == four["ffn"] and four["W"] < 1.01 * one["W"]
    assert four["S"] - one["S"] == 2 * DIM * (4000**2 - 4 * 1000**2)


def test_the_peak_is_known_by_name_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak_flops(torch.device("cpu")) is None
    for name, peak in (("NVIDIA H200", 989e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA X9", None)):
        monkeypatch.setattr(model_flops.torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == peak
