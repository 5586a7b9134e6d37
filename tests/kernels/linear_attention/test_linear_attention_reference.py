"""The reference is the paper's formula: sums written anew, closed forms, and one rounding."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.linear_attention.causal_rows import causal_rows
from gbla_kernels.testing.attention_subject import TOKEN_INPUTS, Subject, Variant, results
from gbla_kernels.testing.error_budget import relative_error
from gbla_kernels.testing.inputs import JaggedLengths

REFERENCE = Subject(backend=Backend.REFERENCE, dtype=torch.float64, key_dim=5, value_dim=3)
CAUSAL = replace(REFERENCE, variant=Variant(direction="causal"))


def definition(
    query: Tensor, key: Tensor, value: Tensor, key_gate: Tensor, output_gate: Tensor, norm_weight: Tensor, is_causal: bool
) -> Tensor:
    """One row, one head, straight from the paper's sums: O(T^2) and written independently of the reference."""
    phi = lambda x: torch.nn.functional.elu(x) + 1  # noqa: E731
    rows = []
    for t in range(query.shape[0]):
        seen = slice(0, t + 1 if is_causal else query.shape[0])
        weight = torch.softmax(key_gate[seen], 0) * (phi(key[seen]) @ phi(query[t]))
        o = weight @ value[seen] / weight.sum()
        rows.append(o / torch.sqrt((o * o).mean() + 1e-6) * norm_weight * output_gate[t] * torch.sigmoid(output_gate[t]))
    return torch.stack(rows)


@pytest.mark.parametrize("subject", [REFERENCE, CAUSAL], ids=["bidirectional", "causal"])
def test_reference_equals_the_papers_sums(subject: Subject) -> None:
    inputs, layout = subject.inputs([7], seed=0)

    def by_definition(norm_weight: Tensor, **tensors: Tensor) -> Tensor:
        heads = [
            definition(*(tensors[name][:, h] for name in TOKEN_INPUTS), norm_weight[h], subject is CAUSAL)  # type: ignore[arg-type]
            for h in range(subject.num_heads)
        ]
        return torch.stack(heads, dim=1)

    actual, expected = subject.run(inputs, layout), results(by_definition, inputs)
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= 1e-11, name


def test_gate_gradient_has_the_closed_form() -> None:
    subject = replace(REFERENCE, num_heads=1, variant=Variant(normalize=False, absent=("output_gate", "norm_weight")))
    inputs, layout = subject.inputs([9], seed=0)
    query, key, value, gate = (inputs[name][:, 0] for name in ("query", "key", "value", "key_gate"))
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    d_output = torch.randn(9, 3, dtype=torch.float64)
    actual = subject.run(inputs, layout, d_output=d_output[:, None])["d_key_gate"]
    a = torch.softmax(gate, 0)
    state = torch.einsum("t,tk,tv->kv", a, phi(key), value)
    d_state = torch.einsum("tk,tv->kv", phi(query), d_output)
    expected = a * (torch.einsum("tk,kv,tv->t", phi(key), d_state, value) - (state * d_state).sum())
    assert relative_error(actual[:, 0], expected) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_fp64_is_one_rounding(dtype: torch.dtype) -> None:
    subject = replace(REFERENCE, dtype=dtype, key_dim=16, value_dim=16)
    inputs, layout = subject.inputs([0, 1, 65, 300], seed=0)
    exact = subject.exact(inputs, layout)
    for name, value in subject.run(inputs, layout).items():
        assert relative_error(value, exact[name]) < torch.finfo(dtype).eps / 2 + 5e-6, name


def test_a_late_large_gate_does_not_erase_earlier_causal_prefixes() -> None:
    inputs, layout = CAUSAL.inputs([6], seed=0)
    gate = inputs["key_gate"].clone()
    gate[-1] = 5000.0
    alone = {name: tensor[:5] if name in TOKEN_INPUTS else tensor for name, tensor in inputs.items()}
    actual = CAUSAL.op(layout)(**{**inputs, "key_gate": gate})[:5]
    assert relative_error(actual, CAUSAL.op(JaggedLayout.from_lengths([5]))(**alone)) < 1e-12


@given(lengths=st.from_type(JaggedLengths), seed=st.integers(0, 7))
def test_causal_rows_at_once_are_the_rows_one_by_one(lengths: list[int], seed: int) -> None:
    lengths = [*lengths, 3]
    inputs, _ = CAUSAL.inputs(lengths, seed)
    tensors = (inputs["query"].exp(), inputs["key"].exp(), inputs["value"], inputs["key_gate"])

    def run(groups: list[list[int]]) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]  # type: ignore[union-attr]
        parts = zip(*(leaf.split([sum(group) for group in groups]) for leaf in leaves), groups, strict=True)
        attended, normalizer = (torch.cat(part) for part in zip(*(causal_rows(*part) for part in parts), strict=True))
        return [attended, normalizer, *torch.autograd.grad(attended.square().sum() + normalizer.square().sum(), leaves)]

    for at_once, alone in zip(run([lengths]), run([[length] for length in lengths if length]), strict=True):
        assert relative_error(at_once, alone) < 1e-12


@pytest.mark.parametrize("row", [slice(0, 3), slice(3, 8), slice(8, 14)], ids=["first", "middle", "last"])
def test_padding_of_a_row_reads_that_row_alone(row: slice) -> None:
    inputs, layout = CAUSAL.inputs([3, 5, 6], seed=0)
    tensors = [inputs[name].clone() for name in ("query", "key", "value", "key_gate")]  # type: ignore[union-attr]
    for tensor in tensors:
        tensor[row] = torch.nan
    for output in causal_rows(*tensors, layout.row_lengths):
        is_nan = output.isnan().flatten(1)
        assert is_nan[row].all() and is_nan.any(1).sum() == row.stop - row.start


def test_a_row_of_131072_among_tiny_ones() -> None:
    subject = replace(REFERENCE, dtype=torch.float32, num_heads=1, key_dim=4, value_dim=4)
    inputs, layout = subject.inputs([1, 0, 131_072, 2], seed=0)
    with torch.no_grad():
        output = subject.op(layout)(**inputs)
        exact = subject.op(layout)(**{name: tensor.double() for name, tensor in inputs.items()})
    assert relative_error(output, exact) < 1e-5
