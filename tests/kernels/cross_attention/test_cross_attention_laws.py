"""Laws of cross-attention on both backends, each for the output and every gradient; kernels run in Triton's interpreter."""

import math
from functools import partial

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention, jagged_cross_attention_packed
from gbla_kernels.cross_attention.autograd import jagged_cross_attention_backward_op, jagged_cross_attention_op
from gbla_kernels.cross_attention.launch_config import launch_config
from gbla_kernels.cross_attention.row_pairs import RowPairs
from gbla_kernels.testing.attention_subject import assert_same_bits, assert_within, output_weights, results
from gbla_kernels.testing.cross_attention_inputs import CrossAttention, Rows
from gbla_kernels.testing.error_budget import relative_error

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover these laws; here kernels are interpreted"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TRITON = CrossAttention(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
SUBJECTS = [pytest.param(TRITON, id="triton"), pytest.param(CrossAttention(backend=Backend.REFERENCE, dtype=torch.float64), id="reference")]
MIXED = [(3, 7), (0, 4), (2, 0), (5, 65), (1, 1), (0, 0)]
"""Rows empty on either side or both."""
CUT = [(2, 520), (1, 3), (33, 40)]
"""A row of several parts, and one of more queries than a tile of the backward holds."""

rows_strategy = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=3)


def definition(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """From a dense score matrix with a block mask, written independently of the reference."""
    queries, keys = (torch.repeat_interleave(torch.tensor([row[side] for row in rows])) for side in (0, 1))
    score = torch.einsum("thk,shk->hts", query, key) / math.sqrt(query.shape[2])
    weight = torch.softmax(score.masked_fill(queries[:, None] != keys[None, :], -torch.inf), dim=-1).nan_to_num(0)
    return torch.einsum("hts,shv->thv", weight, value)


def test_reference_equals_the_dense_definition() -> None:
    subject = CrossAttention(backend=Backend.REFERENCE, dtype=torch.float64)
    inputs = subject.inputs(MIXED)
    expected = results(partial(definition, rows=MIXED), inputs)
    assert_within(subject.run(inputs, MIXED), expected, dict.fromkeys(expected, 1e-12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_err_no_more_than_the_dtype_must(dtype: torch.dtype) -> None:
    subject = CrossAttention(backend=Backend.TRITON, dtype=dtype, num_heads=2)
    subject.assert_within_budget(subject.inputs(MIXED), MIXED)


@pytest.mark.parametrize("widths", [(200, 24), (24, 128), (256, 256)], ids=str)
def test_wide_heads_err_no_more_than_they_must(widths: tuple[int, int]) -> None:
    subject = CrossAttention(backend=Backend.TRITON, dtype=torch.float32, key_dim=widths[0], value_dim=widths[1])
    subject.assert_within_budget(subject.inputs(MIXED), MIXED)


def test_rows_in_parts_and_with_more_queries_than_a_tile() -> None:
    rows = [(2, 600), (33, 530)]
    TRITON.assert_within_budget(TRITON.inputs(rows), rows)


@settings(max_examples=3)
@given(rows=rows_strategy)
@example(rows=[(3, 0), (0, 2)])
def test_ragged_batches_err_no_more_than_the_dtype_must(rows: Rows) -> None:
    TRITON.assert_within_budget(TRITON.inputs(rows), rows)


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("rows", [MIXED, CUT], ids=["mixed", "cut"])
def test_packed_batch_in_any_order_is_each_row_alone_bit_for_bit(subject: CrossAttention, rows: Rows) -> None:
    subject.assert_each_row_is_alone(rows, order=list(range(len(rows)))[::-1])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_rows_without_keys_or_queries_give_zeros(subject: CrossAttention) -> None:
    rows = [(2, 0), (3, 5), (0, 4)]
    inputs = subject.inputs(rows)
    found = subject.run(inputs, rows)
    assert torch.all(found["output"][:2] == 0) and torch.all(found["d_query"][:2] == 0)
    assert torch.all(found["d_key"][5:] == 0) and torch.all(found["d_value"][5:] == 0)
    assert found["output"][2:].abs().min() > 0 and found["d_value"][:5].abs().min() > 0


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 5)], [(4, 0)]])
def test_batches_without_any_pair_keep_their_gradients(subject: CrossAttention, rows: Rows) -> None:
    for name, value in subject.run(subject.inputs(rows), rows).items():
        assert torch.all(value == 0), name


def test_very_large_and_very_negative_scores_stay_finite() -> None:
    inputs = {name: tensor * 40 for name, tensor in TRITON.inputs(MIXED).items()}
    # one direction for all: scores of a row are all near -7000
    inputs["query"], inputs["key"] = -inputs["query"].abs(), inputs["key"].abs()
    assert all(value.isfinite().all() for value in TRITON.run(inputs, MIXED).values())


def test_the_place_of_partial_results_changes_nothing() -> None:
    # alone, a cut row's partial results lie by query; among many rows, by split
    rows = [(1, 520), *[(1, 1)] * 5]
    config = launch_config(20, 24, torch.float32)
    packed, alone = (RowPairs.from_layouts(*TRITON.layouts(part), config, is_traced=False) for part in (rows, rows[:1]))
    assert packed.has_parts and alone.has_parts
    assert (packed.parts_per_query, alone.parts_per_query) == (0, 2)
    TRITON.assert_each_row_is_alone(rows, order=[0, 1, 2, 3, 4, 5])


def test_scale_is_applied_and_defaults_to_the_width() -> None:
    inputs, (queries, keys) = TRITON.inputs(MIXED), TRITON.layouts(MIXED)

    def attend(scale: float | None) -> Tensor:
        return jagged_cross_attention(**inputs, query_layout=queries, key_layout=keys, scale=scale, backend=Backend.TRITON)

    assert torch.equal(attend(None), attend(20**-0.5))
    scaled = TRITON.op(MIXED)(**{**inputs, "query": inputs["query"] * -0.3 * 20**0.5})
    assert relative_error(attend(-0.3), scaled) < 1e-5


@pytest.mark.parametrize("backend", [Backend.TRITON, Backend.REFERENCE])
def test_packed_keys_and_values_give_the_same_bits(backend: Backend) -> None:
    subject = CrossAttention(backend=backend, dtype=torch.float32, key_dim=20, value_dim=20)
    inputs, layouts = subject.inputs(MIXED), subject.layouts(MIXED)
    expected = subject.run(inputs, MIXED)
    query = inputs["query"].clone().requires_grad_()
    key_value = torch.stack((inputs["key"], inputs["value"]), dim=1).requires_grad_()
    output = jagged_cross_attention_packed(query, key_value, *layouts, backend=backend)
    d_query, d_key_value = torch.autograd.grad(output, (query, key_value), output_weights(output))
    found = {"output": output.detach(), "d_query": d_query, "d_key": d_key_value[:, 0], "d_value": d_key_value[:, 1]}
    assert_same_bits(found, expected)


def test_registered_ops_pass_opcheck() -> None:
    rows = [(2, 5), (1, 0)]
    inputs = [tensor.detach().clone() for tensor in TRITON.inputs(rows).values()]
    pairs = RowPairs.from_layouts(*TRITON.layouts(rows), launch_config(20, 24, torch.float32), is_traced=True)
    torch.library.opcheck(jagged_cross_attention_op, (*(x.clone().requires_grad_() for x in inputs), *pairs, 0.2))
    output, lse = jagged_cross_attention_op(*inputs, *pairs, 0.2)
    arguments = (output_weights(output), *inputs, output, lse, *pairs, 0.2)
    torch.library.opcheck(jagged_cross_attention_backward_op, arguments)


def test_compiled_equals_eager() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, queries: JaggedLayout, keys: JaggedLayout) -> Tensor:
        return jagged_cross_attention(query, key, value, queries, keys, backend=Backend.TRITON) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in ([(2, 5), (1, 0)], [(1, 3), (0, 2), (4, 9)]):
        queries, keys = TRITON.layouts(rows)
        actual = results(partial(compiled, queries=queries, keys=keys), TRITON.inputs(rows))
        assert_same_bits(actual, results(partial(attend, queries=queries, keys=keys), TRITON.inputs(rows)))


@pytest.mark.parametrize("backend", list(Backend))
def test_autocast_changes_nothing(backend: Backend) -> None:
    subject = CrossAttention(backend=backend, dtype=torch.float32)
    inputs, op = subject.inputs(MIXED), subject.op(MIXED)

    def op_under_autocast(**tensors: Tensor) -> Tensor:
        # forward alone, as in training
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(**tensors)

    assert_same_bits(results(op_under_autocast, inputs), results(op, inputs))


def test_wrong_arguments_are_refused_by_name() -> None:
    inputs, (queries, keys) = TRITON.inputs([(2, 3)]), TRITON.layouts([(2, 3)])
    other = JaggedLayout.from_lengths([2, 1])

    def attend(**changed: object) -> Tensor:
        arguments = {**inputs, "query_layout": queries, "key_layout": keys, "backend": Backend.TRITON, **changed}
        return jagged_cross_attention(**arguments)  # type: ignore[arg-type]

    with pytest.raises(ValueError, match="must have the same rows, got 1 and 2"):
        attend(key_layout=other)
    with pytest.raises(ValueError, match="key_layout must have the tokens of key, got 2 and 3"):
        attend(key_layout=queries)
    with pytest.raises(ValueError, match=r"key must have shape \(L_key, H, K\)"):
        attend(key=inputs["key"][:2])
    with pytest.raises(ValueError, match=r"value must have the dtype of query, got torch\.float64 and torch\.float32"):
        attend(value=inputs["value"].double())
    with pytest.raises(NotImplementedError, match="got fp64"):
        attend(**{name: tensor.double() for name, tensor in inputs.items()})
