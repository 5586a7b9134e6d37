"""Cross-attention on a GPU: exact, the same bits whoever shares the batch, no wait for the device, nothing compiled twice."""

import random
from functools import partial

import pytest
import torch
import triton
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention, jagged_cross_attention_packed
from gbla_kernels.cross_attention.autograd import jagged_cross_attention_backward_op, jagged_cross_attention_op
from gbla_kernels.cross_attention.launch_config import launch_config
from gbla_kernels.cross_attention.row_pairs import RowPairs
from gbla_kernels.testing.attention_subject import assert_same_bits, output_weights, results
from gbla_kernels.testing.cross_attention_inputs import CrossAttention, Rows
from gbla_kernels.testing.cuda_graph import assert_replays
from gbla_kernels.testing.device_waits import synchronisations_raise

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

MIXED = [(3, 7), (0, 4), (2, 0), (70, 1500), (130, 600), (5, 5000), (64, 513), (1, 1), (0, 0), (128, 2049)]
"""Every kernel of the backward; rows empty on either side; rows of one part and of several."""
GIANT = [(2, 5), (40, 131072), (1, 1), (0, 3), (129, 70)]
BEAMS = [(50, keys) for keys in (2048, 0, 77, 1, 900, 3000)]
BF16 = CrossAttention(backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", key_dim=64, value_dim=64)


def subject_of(dtype: torch.dtype, key_dim: int, value_dim: int) -> CrossAttention:
    return CrossAttention(backend=Backend.TRITON, dtype=dtype, device="cuda", key_dim=key_dim, value_dim=value_dim)


@pytest.mark.parametrize("rows", [MIXED, GIANT, BEAMS], ids=["mixed", "giant", "beams"])
@pytest.mark.parametrize("widths", [(64, 64), (128, 128), (20, 24), (96, 256)], ids=str)
def test_bf16_errs_no_more_than_it_must(widths: tuple[int, int], rows: Rows) -> None:
    subject = subject_of(torch.bfloat16, *widths)
    subject.assert_within_budget(subject.inputs(rows), rows)


@pytest.mark.parametrize("widths", [(64, 64), (24, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_err_no_more_than_they_must(dtype: torch.dtype, widths: tuple[int, int]) -> None:
    subject = subject_of(dtype, *widths)
    for rows in (MIXED, GIANT):
        subject.assert_within_budget(subject.inputs(rows), rows)


def test_widest_fp32_fits_the_chip() -> None:
    rows = [(3, 70), (40, 600), (0, 1)]
    subject = subject_of(torch.float32, 256, 256)
    subject.assert_within_budget(subject.inputs(rows), rows)


@pytest.mark.parametrize("rows", [MIXED, GIANT, BEAMS], ids=["mixed", "giant", "beams"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_batch_in_any_order_is_each_row_alone_bit_for_bit(dtype: torch.dtype, rows: Rows) -> None:
    subject = subject_of(dtype, 64, 64)
    order = list(range(len(rows)))
    random.Random(0).shuffle(order)
    subject.assert_each_row_is_alone(rows, order)


def test_runs_give_the_same_bits() -> None:
    inputs = BF16.inputs(MIXED + GIANT)
    first = BF16.run(inputs, MIXED + GIANT)
    for _ in range(5):
        assert_same_bits(BF16.run(inputs, MIXED + GIANT), first)


def test_autocast_changes_nothing() -> None:
    inputs = BF16.inputs(MIXED)
    expected = BF16.run(inputs, MIXED)
    with torch.autocast("cuda", dtype=torch.float16):
        assert_same_bits(BF16.run(inputs, MIXED), expected)


def test_packed_keys_and_values_give_the_same_bits() -> None:
    inputs, layouts = BF16.inputs(MIXED), BF16.layouts(MIXED)
    query = inputs["query"].clone().requires_grad_()
    key_value = torch.stack((inputs["key"], inputs["value"]), dim=1).requires_grad_()
    output = jagged_cross_attention_packed(query, key_value, *layouts, backend=Backend.TRITON)
    d_query, d_key_value = torch.autograd.grad(output, (query, key_value), output_weights(output).to(output.dtype))
    found = {"output": output.detach(), "d_query": d_query, "d_key": d_key_value[:, 0], "d_value": d_key_value[:, 1]}
    assert_same_bits(found, BF16.run(inputs, MIXED))


def test_forward_and_backward_do_not_synchronise() -> None:
    inputs, op = BF16.inputs(MIXED), BF16.op(MIXED)
    weights = output_weights(torch.empty(sum(row[0] for row in MIXED), 2, 64)).to("cuda", torch.bfloat16)
    expected = results(op, inputs, weights)
    with synchronisations_raise():
        actual = results(op, inputs, weights)
    assert_same_bits(actual, expected)


def random_rows(generator: random.Random) -> list[tuple[int, int]]:
    num_rows = generator.choice([1, 1, 2, 5, 17])
    queries, keys = generator.choice([1, 16, 70, 300]), generator.choice([1, 16, 600, 3000])
    return [(generator.choice([0, 1, 16, generator.randint(0, queries)]), generator.choice([0, 1, 16, generator.randint(0, keys)]))
            for _ in range(num_rows)]  # fmt: skip


def test_sixty_jagged_batches_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    subject = subject_of(torch.bfloat16, 48, 80)

    def count(**event: object) -> None:
        compiled.append(str(event["repr"]))

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    subject.run(subject.inputs(MIXED), MIXED)
    assert compiled, "the hook sees compilations"
    compiled.clear()
    generator = random.Random(0)
    for number, rows in enumerate([[], [(0, 0)], [(1, 1)], [(1, 513)], [(129, 1)], *(random_rows(generator) for _ in range(55))]):
        subject.run(subject.inputs(rows, seed=number), rows)
        assert not compiled, f"batch {number} of rows {rows} compiled {compiled}"


def test_cuda_graph_replays_forward_and_backward() -> None:
    first, second, op = BF16.inputs(MIXED), BF16.inputs(MIXED, seed=1), BF16.op(MIXED)
    weights = output_weights(torch.empty(sum(row[0] for row in MIXED), 2, 64)).to("cuda", torch.bfloat16)
    assert_replays(lambda inputs: results(op, inputs, weights), first, second)


def test_registered_ops_pass_opcheck() -> None:
    inputs = [tensor.detach().clone() for tensor in BF16.inputs(MIXED).values()]
    pairs = RowPairs.from_layouts(*BF16.layouts(MIXED), launch_config(64, 64, torch.bfloat16), is_traced=True)
    torch.library.opcheck(jagged_cross_attention_op, (*(x.clone().requires_grad_() for x in inputs), *pairs, 0.125))
    output, lse = jagged_cross_attention_op(*inputs, *pairs, 0.125)
    arguments = (torch.randn_like(output), *inputs, output, lse, *pairs, 0.125)
    torch.library.opcheck(jagged_cross_attention_backward_op, arguments)


def test_compiled_equals_eager() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, queries: JaggedLayout, keys: JaggedLayout) -> Tensor:
        return jagged_cross_attention(query, key, value, queries, keys, backend=Backend.TRITON)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for rows in (MIXED, BEAMS, GIANT):
        queries, keys = BF16.layouts(rows)
        inputs = BF16.inputs(rows)
        actual = results(partial(compiled, queries=queries, keys=keys), inputs)
        assert_same_bits(actual, results(partial(attend, queries=queries, keys=keys), inputs))


def test_addresses_pass_two_to_the_31() -> None:
    """The last of nine rows of 131072 keys lies beyond: 2.4e9 elements of keys and values."""
    rows = [(4, 131072)] * 9
    queries, keys = (JaggedLayout.from_lengths([row[side] for row in rows]).to("cuda") for side in (0, 1))
    generator = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(36, 8, 128, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    key_value = torch.randn(9 * 131072, 2, 8, 128, device="cuda", dtype=torch.bfloat16, generator=generator).requires_grad_()
    assert key_value.numel() > 2**31
    output = jagged_cross_attention_packed(query, key_value, queries, keys, backend=Backend.TRITON)
    gradients = torch.autograd.grad(output.sum(), (query, key_value))
    last_query, last_key_value = query.detach()[-4:].requires_grad_(), key_value.detach()[-131072:].requires_grad_()
    alone = [JaggedLayout.from_lengths([count]).to("cuda") for count in rows[-1]]
    expected = jagged_cross_attention_packed(last_query, last_key_value, *alone, backend=Backend.TRITON)
    expected_gradients = torch.autograd.grad(expected.sum(), (last_query, last_key_value))
    assert torch.equal(output[-4:], expected)
    assert torch.equal(gradients[0][-4:], expected_gradients[0])
    assert torch.equal(gradients[1][-131072:], expected_gradients[1])
