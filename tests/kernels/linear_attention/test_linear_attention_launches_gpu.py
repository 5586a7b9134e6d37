"""Calls never wait for the GPU, never compile again, and replay from a CUDA graph."""

import random
from functools import partial

import pytest
import torch
import triton

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT, TINY_ROW_LIMITS
from gbla_kernels.testing.attention_subject import Results, Subject, assert_same_bits, output_weights, results
from gbla_kernels.testing.cuda_graph import assert_replays, capture
from gbla_kernels.testing.device_waits import synchronisations_raise

pytestmark = pytest.mark.gpu

BF16 = Subject(backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", num_heads=2, key_dim=64, value_dim=64)
layout_or_offsets = pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])


@layout_or_offsets
def test_forward_and_backward_do_not_synchronise(has_layout: bool) -> None:
    inputs, layout = BF16.inputs([0, 3, 700, 64, 5000], seed=0)
    d_output = output_weights(inputs["value"]).to(torch.bfloat16)
    # the first call compiles
    expected = BF16.run(inputs, layout, d_output=d_output, has_layout=has_layout)
    with synchronisations_raise():
        actual = BF16.run(inputs, layout, d_output=d_output, has_layout=has_layout)
    assert_same_bits(actual, expected)


def test_the_synchronisation_guard_would_notice() -> None:
    ones = torch.ones(2, device="cuda")
    with synchronisations_raise(), pytest.raises(RuntimeError, match="synchroniz"):
        ones.sum().item()


def random_lengths(generator: random.Random) -> list[int]:
    num_rows = generator.choice([1, 1, 2, 5, 17])
    longest = generator.choice([1, 16, 70, 600, 3000])
    return [generator.choice([0, 1, 16 * generator.randint(0, longest // 16), generator.randint(0, longest)]) for _ in range(num_rows)]


def test_hundred_jagged_batches_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    """After one batch that has short rows of every class and a row of more splits than its readers add up."""
    compiled: list[str] = []
    subject = Subject(backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", num_heads=3, key_dim=48, value_dim=80)

    def count(**event: object) -> None:
        compiled.append(str(event["repr"]))

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    warm_inputs, warm_layout = subject.inputs([3, 0, *TINY_ROW_LIMITS, SHORT_LIMIT, SPLIT, 9000], seed=0)
    subject.run(warm_inputs, warm_layout)
    assert compiled, "the hook sees compilations"
    compiled.clear()
    generator = random.Random(0)
    batches = [[], [0], [1], [16], [17], [SHORT_LIMIT], [SPLIT], [SPLIT + 1], *(random_lengths(generator) for _ in range(92))]
    for number, lengths in enumerate(batches):
        inputs, layout = subject.inputs(lengths, seed=number)
        subject.run(inputs, layout, has_layout=number % 2 == 0)
        assert not compiled, f"batch {number} of lengths {lengths} compiled {compiled}"


@layout_or_offsets
def test_cuda_graph_replays_forward_and_backward(has_layout: bool) -> None:
    lengths = [0, 3, 700, 64, 5000]
    first, layout = BF16.inputs(lengths, seed=0)
    second, _ = BF16.inputs(lengths, seed=1)
    d_output = output_weights(first["value"]).to(torch.bfloat16)
    assert_replays(lambda inputs: BF16.run(inputs, layout, d_output=d_output, has_layout=has_layout), first, second)


def test_a_graph_without_layout_serves_other_rows() -> None:
    """Tables are then made inside the graph: it replays for other rows of the same number and total."""
    lengths, others = [0, 3, 700, 64, 5000], [2000, 67, 0, 3699, 1]
    inputs, layout = BF16.inputs(lengths, seed=0)
    other_layout = JaggedLayout.from_lengths(others).to("cuda")
    offsets = layout.offsets.clone()
    d_output = output_weights(inputs["value"]).to(torch.bfloat16)

    def run() -> Results:
        return results(partial(gated_linear_attention, offsets=offsets, backend=Backend.TRITON), inputs, d_output)

    captured, replay = capture(run)
    offsets.copy_(other_layout.offsets)
    replay()
    assert_same_bits(captured, BF16.run(inputs, other_layout, d_output=d_output, has_layout=False))
