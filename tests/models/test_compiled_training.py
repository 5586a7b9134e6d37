"""The compiled dense part: one graph for every batch, and the losses and gradients of eager mode; recomputed layers change no bit."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig
from gbla_rec.data.item_queries import ItemQueries
from gbla_rec.models.retriever import HistoryModel

WIDTHS, NUM_ITEMS, TABLE_DIM = (16, 8), 50, 8
FEATURES = ["item_hash_0", "item_hash_1"]
CONFIG = ModelConfig(
    embedding=EmbeddingConfig(dim=TABLE_DIM, semantic_code_dim=4),
    encoder=EncoderConfig(model_dim=32, num_heads=2, pattern="SG", ffn_dim=32, dropout=0.2),
    decoder=DecoderConfig(num_heads=2, ffn_dim=32, dropout=0.2, label_smoothing=0.1),
)
CODES_CONFIG = dataclasses.replace(
    CONFIG,
    embedding=EmbeddingConfig(dim=TABLE_DIM, tokens="codes", context_features=("kind",)),
    encoder=dataclasses.replace(CONFIG.encoder, pattern="S"),
    decoder=dataclasses.replace(CONFIG.decoder, num_layers=2),
)
JOINT_CONFIG = dataclasses.replace(
    CONFIG,
    embedding=EmbeddingConfig(dim=TABLE_DIM, semantic_code_dim=4, id_dropout=0.5, event_dropout=0.1, token_dropout=0.2, item_features=True),
    encoder=dataclasses.replace(CONFIG.encoder, pattern="G"),
    objective="joint",
)


class Rows:
    def __init__(self, values: Tensor) -> None:
        self._values = values

    def values(self) -> Tensor:
        return self._values


def history_model(config: ModelConfig = CONFIG, device: str = "cpu", backend: Backend = Backend.REFERENCE) -> HistoryModel:
    torch.manual_seed(0)
    codes = torch.stack([torch.randint(0, width, (NUM_ITEMS,)) for width in WIDTHS], dim=1)
    features = torch.randn(NUM_ITEMS, 6) if config.embedding.item_features else None
    return HistoryModel(config, FEATURES, codes, WIDTHS, backend, features).to(device)


def history_batch(lengths: list[int], targets: list[int], device: str = "cpu", config: ModelConfig = CONFIG) -> tuple[dict[str, Rows], Any]:
    """Embedded rows that want gradients, and what the model reads of a ``Batch``."""
    generator = torch.Generator().manual_seed(sum(lengths))
    num_events, num_targets, tokens = sum(lengths), sum(targets), config.embedding.tokens_per_event(len(WIDTHS))
    num_rows = [num_events if config.embedding.reads_item_ids else 0, num_events]
    if config.has_item_head:
        num_rows = [num_events + NUM_ITEMS] * 2

    def integers(high: int, size: int) -> Tensor:
        return torch.randint(0, high, (size,), generator=generator).to(device)

    made = [torch.randn(count, TABLE_DIM, generator=generator).to(device).requires_grad_() for count in num_rows]
    rows = {name: Rows(values) for name, values in zip(FEATURES, made, strict=True)}
    batch = SimpleNamespace(
        items=integers(NUM_ITEMS, num_events),
        token_keys=integers(2**62, num_events * tokens),
        targets=integers(NUM_ITEMS, num_targets),
        target_keys=integers(2**62, num_targets),
        layout=JaggedLayout.from_lengths([tokens * length for length in lengths]).to(device),
        code_layout=JaggedLayout.from_lengths([len(WIDTHS) * count for count in targets]).to(device),
        loss_weight=1 / max(num_targets, 1),
        queries=item_queries(lengths, targets, integers, device) if config.has_item_head else None,
    )
    return rows, batch


def item_queries(lengths: list[int], targets: list[int], integers: Any, device: str) -> ItemQueries:
    """The newest event asks for each target; whose history is empty asks as any event."""
    newest = torch.tensor(lengths).cumsum(0).sub(1).clamp(min=0)
    positions = torch.repeat_interleave(newest, torch.tensor(targets)).to(device)
    return ItemQueries(positions, integers(NUM_ITEMS, sum(targets)), torch.arange(NUM_ITEMS, device=device), torch.zeros(0, device=device))


def outcome(model: HistoryModel, rows: dict[str, Rows], batch: Any) -> dict[str, Tensor]:
    """NLL, and the gradients of every parameter and of the embedded rows."""
    leaves = {**dict(model.named_parameters()), **{name: values.values() for name, values in rows.items()}}
    loss, nll = model(rows, batch)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"nll": nll, **dict(zip(leaves, gradients, strict=True))}


def batches() -> list[tuple[list[int], list[int]]]:
    """Row lengths and targets per row: the awkward ones first, then random ones with empty rows."""
    generator = torch.Generator().manual_seed(1)
    found = [([40], [16]), ([16], [17]), ([0, 33, 0], [0, 20, 1]), ([1] * 20, [1] * 20), ([30, 30], [15, 15])]
    for _ in range(15):
        num_rows = int(torch.randint(1, 7, (1,), generator=generator))
        lengths = (
            torch.randint(0, 60, (num_rows,), generator=generator) * (torch.rand(num_rows, generator=generator) > 0.2).long()
        ).tolist()
        targets = torch.randint(0, 9, (num_rows,), generator=generator).tolist()
        found.append((lengths, targets))
    return [*found, ([0], [3]), ([5], [0]), ([2, 0], [1, 1])]


@pytest.mark.parametrize(
    ("config", "activation_checkpointing", "backend"),
    [
        pytest.param(CONFIG, False, "aot_eager", marks=pytest.mark.slow),
        (CONFIG, True, "eager"),
        (CODES_CONFIG, False, "eager"),
        (JOINT_CONFIG, False, "eager"),
    ],
    ids=["items", "items recomputed", "codes", "joint"],
)
def test_one_graph_for_every_batch_and_eager_results(config: ModelConfig, activation_checkpointing: bool, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder = dataclasses.replace(config.encoder, activation_checkpointing=activation_checkpointing)
    eager, compiled = history_model(config), history_model(dataclasses.replace(config, encoder=encoder))
    counter = CompileCounterWithBackend(backend)
    compiled.compile_training(counter)
    num_compiled_batches = 0
    for lengths, targets in batches():
        if config.has_item_head and sum(lengths) == 0:
            continue
        expected, actual = (outcome(model, *history_batch(lengths, targets, config=config)) for model in (eager, compiled))
        num_compiled_batches += min(sum(lengths), sum(targets)) >= 16
        for name, value in expected.items():
            assert actual[name].shape == value.shape
            if value.numel() and value.abs().max() > 0:
                assert relative_error(actual[name], value) < 1e-5, (name, lengths)
    assert num_compiled_batches > 8
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"] and not torch._dynamo.utils.counters["unimplemented"]


def test_evaluation_runs_eager() -> None:
    model = history_model().eval()
    counter = CompileCounterWithBackend("aot_eager")
    model.compile_training(counter)
    model(*history_batch([40], [16]))
    assert counter.frame_count == 0


def test_recomputed_layers_give_the_same_gradients_and_keep_less() -> None:
    encoder = dataclasses.replace(CONFIG.encoder, activation_checkpointing=True)
    plain, recomputed = history_model(), history_model(dataclasses.replace(CONFIG, encoder=encoder))
    lengths, targets = [0, 70, 1, 300], [2, 5, 0, 9]
    saved: dict[str, int] = {}
    results = {}
    for name, model in (("plain", plain), ("recomputed", recomputed)):
        kept: dict[int, Tensor] = {}

        def keep(tensor: Tensor, kept: dict[int, Tensor] = kept) -> Tensor:
            kept[tensor.data_ptr()] = tensor
            return tensor

        rows, batch = history_batch(lengths, targets)
        leaves = {**dict(model.named_parameters()), **{feature: values.values() for feature, values in rows.items()}}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss, _ = model(rows, batch)
        saved[name] = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        results[name] = torch.autograd.grad(loss, list(leaves.values()))
    assert all(torch.equal(a, b) for a, b in zip(results["plain"], results["recomputed"], strict=True))
    assert saved["recomputed"] < 0.5 * saved["plain"], saved


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("base", "activation_checkpointing"), [(CONFIG, False), (CONFIG, True), (CODES_CONFIG, False), (JOINT_CONFIG, False)]
)
def test_one_training_step_on_a_gpu_never_synchronises(base: ModelConfig, activation_checkpointing: bool) -> None:
    encoder = EncoderConfig(
        model_dim=128, num_heads=2, pattern="SGW", window=64, dropout=0.2, activation_checkpointing=activation_checkpointing
    )
    config = dataclasses.replace(base, encoder=encoder, kernels="triton")
    model = history_model(config, "cuda", Backend.TRITON)
    # jagged, dense, and of short rows: the three attention kernels; more tokens than one block of an embedding's backward
    cases = [([300, 7, 0, 1000], [9, 1, 2, 5]), ([512, 512], [8, 8]), ([20] * 30, [1] * 30), ([4000, 90], [20, 3])]
    made = [history_batch(lengths, targets, "cuda", config) for lengths, targets in cases]

    def step(rows: dict[str, Rows], batch: Any) -> None:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss, _ = model(rows, batch)
        loss.backward()

    for rows, batch in made:
        # compiles kernels and plans, which may synchronise
        step(rows, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows, batch in made:
            step(rows, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.gpu
def test_compiled_training_on_a_gpu_is_near_eager_with_a_graph_for_each_choice_of_kernels() -> None:
    torch._dynamo.reset()
    encoder = EncoderConfig(model_dim=128, num_heads=2, pattern="SG", dropout=0.2)
    config = dataclasses.replace(CONFIG, encoder=encoder, kernels="triton")
    eager, compiled = (history_model(config, "cuda", Backend.TRITON) for _ in range(2))
    counter = CompileCounterWithBackend("inductor")
    compiled.compile_training(counter)
    # long rows, short rows, rows of one length that cuDNN takes dense, others of one length, and rows whose keys the decoder does
    # not divide (at most MIN_PART); then each again in other sizes
    first = [([300, 7, 0, 1000], [9, 1, 2, 5]), ([40, 3], [16, 1]), ([640] * 2, [8, 8]), ([40, 40], [9, 9]), ([500, 20], [7, 11])]
    # with targets on rows of 0 and 1 events alone, gradients before the cross-attention would be zero but for rounding
    again = [
        ([2, 700, 90], [3, 9, 9]),
        ([200, 0, 1], [4, 30, 1]),
        ([1024] * 3, [10, 0, 9]),
        ([33] * 5, [5] * 5),
        ([3, 270], [9, 20]),
    ]
    num_graphs = 0
    for lengths, targets in [*first, *again]:
        if lengths == again[0][0]:
            num_graphs = counter.frame_count
        with torch.autocast("cuda", dtype=torch.bfloat16):
            expected, actual = (outcome(model, *history_batch(lengths, targets, "cuda")) for model in (eager, compiled))
        assert relative_error(actual["nll"], expected["nll"]) < 0.01
        for name, value in expected.items():
            assert relative_error(actual[name].float(), value.float()) < 0.1, (name, lengths)
    assert num_graphs == counter.frame_count <= 4
