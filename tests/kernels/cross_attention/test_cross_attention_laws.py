"""Laws of cross-attention on both backends, each for the output and every gradient; kernels run in Triton's interpreter."""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention
from gbla_kernels.cross_attention.autograd import jagged_cross_attention_op
from gbla_kernels.cross_attention.launch_config import launch_config
from gbla_kernels.cross_attention.row_pairs import RowPairs
from gbla_kernels.testing.cross_attention_inputs import CrossAttention, Rows
from gbla_kernels.testing.error_budget import assert_within_budget, outputs_and_gradients, relative_error

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover these laws; here kernels are interpreted"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TRITON = CrossAttention(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
SUBJECTS = [pytest.param(TRITON, id="triton"), pytest.param(CrossAttention(backend=Backend.REFERENCE, dtype=torch.float64), id="reference")]
MIXED = [(3, 7), (0, 4), (2, 0), (5, 65), (1, 1), (0, 0)]
"""Rows empty on either side or both."""
CUT = [(2, 600), (1, 3), (33, 530)]
"""A row of several parts, and one of more queries than a tile of the backward holds."""

rows_strategy = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=4)


def definition(query: Tensor, key: Tensor, value: Tensor, rows: Rows) -> Tensor:
    """From a dense score matrix with a block mask, written independently of the reference."""
    queries, keys = (torch.repeat_interleave(torch.tensor([row[side] for row in rows])) for side in (0, 1))
    score = torch.einsum("thk,shk->hts", query, key) / math.sqrt(query.shape[2])
    weight = torch.softmax(score.masked_fill(queries[:, None] != keys[None, :], -torch.inf), dim=-1).nan_to_num(0)
    return torch.einsum("hts,shv->thv", weight, value)


def results(subject: CrossAttention, rows: Rows, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients, the output's being a function of the output alone."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = subject.op(rows)(**leaves)
    gradients = torch.autograd.grad(output.square().sum(), list(leaves.values()))
    return {"output": output.detach(), **dict(zip(leaves, gradients, strict=True))}


def assert_each_row_is_alone(subject: CrossAttention, rows: Rows, order: list[int]) -> None:
    inputs = subject.inputs(rows)
    parts = {name: tensor.split([row[name != "query"] for row in rows]) for name, tensor in inputs.items()}
    shuffled = {name: torch.cat([split[i] for i in order]) for name, split in parts.items()}
    packed = results(subject, [rows[i] for i in order], shuffled)
    starts = {"query": 0, "key": 0}
    for i in order:
        alone = results(subject, [rows[i]], {name: split[i] for name, split in parts.items()})
        for name, value in alone.items():
            side = "query" if name in ("query", "output") else "key"
            found = packed[name][starts[side] : starts[side] + value.shape[0]]
            assert torch.equal(found, value), (name, i)
        starts = {"query": starts["query"] + rows[i][0], "key": starts["key"] + rows[i][1]}


def test_reference_equals_the_dense_definition() -> None:
    subject = CrossAttention(backend=Backend.REFERENCE, dtype=torch.float64)
    inputs = subject.inputs(MIXED)
    expected = outputs_and_gradients(lambda **tensors: definition(**tensors, rows=MIXED), inputs)
    for name, value in outputs_and_gradients(subject.op(MIXED), inputs).items():
        assert relative_error(value, expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_err_no_more_than_the_dtype_must(dtype: torch.dtype) -> None:
    subject = CrossAttention(backend=Backend.TRITON, dtype=dtype, num_heads=2)
    assert_within_budget(subject.op(MIXED), subject.reference(MIXED), subject.inputs(MIXED))


def test_rows_in_parts_and_with_more_queries_than_a_tile() -> None:
    rows = [*CUT, (66, 70)]
    assert_within_budget(TRITON.op(rows), TRITON.reference(rows), TRITON.inputs(rows))


@settings(max_examples=4)
@given(rows=rows_strategy)
@example(rows=[(0, 0)])
@example(rows=[(3, 0), (0, 2)])
def test_ragged_batches_err_no_more_than_the_dtype_must(rows: Rows) -> None:
    # four units: a batch of single keys has exact gradients of zero
    inputs = TRITON.inputs(rows)
    expected = outputs_and_gradients(TRITON.reference(rows), {name: x.double() for name, x in inputs.items()})
    for name, value in outputs_and_gradients(TRITON.op(rows), inputs).items():
        assert relative_error(value, expected[name]) < 1e-5, name


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("rows", [MIXED, CUT], ids=["mixed", "cut"])
def test_packed_batch_in_any_order_is_each_row_alone_bit_for_bit(subject: CrossAttention, rows: Rows) -> None:
    assert_each_row_is_alone(subject, rows, order=list(range(len(rows)))[::-1])


@pytest.mark.parametrize("subject", SUBJECTS)
def test_rows_without_keys_or_queries_give_zeros(subject: CrossAttention) -> None:
    rows = [(2, 0), (3, 5), (0, 4)]
    inputs = subject.inputs(rows)
    found = results(subject, rows, inputs)
    assert torch.all(found["output"][:2] == 0) and torch.all(found["query"][:2] == 0)
    assert torch.all(found["key"][5:] == 0) and torch.all(found["value"][5:] == 0)
    assert found["output"][2:].abs().min() > 0 and found["value"][:5].abs().min() > 0


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("rows", [[], [(0, 0)], [(0, 5)], [(4, 0)]])
def test_batches_without_any_pair_keep_their_gradients(subject: CrossAttention, rows: Rows) -> None:
    for name, value in results(subject, rows, subject.inputs(rows)).items():
        assert torch.all(value == 0), name


def test_very_large_and_very_negative_scores_stay_finite() -> None:
    inputs = {name: tensor * 40 for name, tensor in TRITON.inputs(MIXED).items()}
    # one direction for all: scores of a row are all near -7000
    inputs["query"], inputs["key"] = -inputs["query"].abs(), inputs["key"].abs()
    assert all(value.isfinite().all() for value in results(TRITON, MIXED, inputs).values())


def test_the_place_of_partial_results_changes_nothing() -> None:
    # alone, a cut row's partial results lie by query; among many rows, by split
    rows = [(1, 600), *[(1, 1)] * 5]
    config = launch_config(20, 24, torch.float32)
    packed, alone = (RowPairs.from_layouts(*TRITON.layouts(part), config, is_traced=False) for part in (rows, rows[:1]))
    assert packed.has_parts and alone.has_parts
    assert (packed.parts_per_query, alone.parts_per_query) == (0, 2)
    assert_each_row_is_alone(TRITON, rows, order=[0, 1, 2, 3, 4, 5])


def test_scale_is_applied_and_defaults_to_the_width() -> None:
    inputs, (queries, keys) = TRITON.inputs(MIXED), TRITON.layouts(MIXED)

    def attend(scale: float | None) -> Tensor:
        return jagged_cross_attention(**inputs, query_layout=queries, key_layout=keys, scale=scale, backend=Backend.TRITON)

    assert torch.equal(attend(None), attend(20**-0.5))
    scaled = TRITON.reference(MIXED)(**{**inputs, "query": inputs["query"] * -0.3 * 20**0.5})
    assert relative_error(attend(-0.3), scaled) < 1e-5


def test_registered_op_passes_opcheck() -> None:
    rows = [(2, 5), (1, 0)]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in TRITON.inputs(rows).values()]
    pairs = RowPairs.from_layouts(*TRITON.layouts(rows), launch_config(20, 24, torch.float32), is_traced=True)
    torch.library.opcheck(jagged_cross_attention_op, (*inputs, *pairs, 0.2))


def test_compiled_equals_eager() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, queries: JaggedLayout, keys: JaggedLayout) -> Tensor:
        return jagged_cross_attention(query, key, value, queries, keys, backend=Backend.TRITON) * 2

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in ([(2, 5), (1, 0)], [(1, 3), (0, 2), (4, 9)]):
        layouts = TRITON.layouts(rows)
        found, expected = (
            outputs_and_gradients(lambda f=f, **x: f(*x.values(), *layouts), TRITON.inputs(rows))  # noqa: B023
            for f in (compiled, attend)
        )
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


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
