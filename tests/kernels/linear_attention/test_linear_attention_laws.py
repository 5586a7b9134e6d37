"""Laws of gated linear attention, each for the output and every gradient."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.testing.error_budget import assert_within_budget, outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import NASTY_LENGTHS, attention_inputs

lengths_strategy = st.lists(st.one_of(st.sampled_from(NASTY_LENGTHS), st.integers(0, 90)), min_size=1, max_size=5)
switches = st.fixed_dictionaries(
    {
        "feature_map": st.sampled_from(["elu1", "relu"]),
        "normalize": st.booleans(),
        "direction": st.sampled_from(["bidirectional", "causal"]),
    }
).filter(lambda options: options["normalize"] or options["direction"] == "bidirectional")
TOKEN_INPUTS = ("query", "key", "value", "key_gate", "output_gate")
Options = dict[str, object]


def op(layout: JaggedLayout, **options: object) -> Callable[..., Tensor]:
    return partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE, **options)


def small_inputs(lengths: list[int], dtype: torch.dtype = torch.float64, **options: object) -> tuple[dict[str, Tensor], JaggedLayout]:
    return attention_inputs(lengths, num_heads=2, key_dim=5, value_dim=3, dtype=dtype, **options)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        assert relative_error(actual[name], expected[name]) <= tolerance, name


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


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_reference_equals_the_papers_sums(direction: str) -> None:
    inputs, layout = small_inputs([7])
    actual = outputs_and_gradients(op(layout, direction=direction), inputs)

    def by_definition(norm_weight: Tensor, **tensors: Tensor) -> Tensor:
        heads = [
            definition(*(tensors[name][:, h] for name in TOKEN_INPUTS), norm_weight[h], direction == "causal")  # type: ignore[arg-type]
            for h in range(2)
        ]
        return torch.stack(heads, dim=1)

    assert_equal(actual, outputs_and_gradients(by_definition, inputs))


@given(lengths=lengths_strategy, options=switches)
@example(lengths=[0, 1, 64, 0, 65], options={"feature_map": "elu1", "normalize": True, "direction": "bidirectional"})
def test_packed_batch_is_each_row_alone_bit_for_bit(lengths: list[int], options: Options) -> None:
    inputs, layout = small_inputs(lengths, torch.float32)
    packed = outputs_and_gradients_with_ones(op(layout, **options), inputs)
    weight_gradient = torch.zeros_like(packed["d_norm_weight"])
    for row, (start, stop) in enumerate(zip(layout.offsets[:-1].tolist(), layout.offsets[1:].tolist(), strict=True)):
        alone = {name: tensor[start:stop] if name in TOKEN_INPUTS else tensor for name, tensor in inputs.items()}
        result = outputs_and_gradients_with_ones(op(JaggedLayout.from_lengths([lengths[row]]), **options), alone)
        for name in ("output", *(f"d_{token_input}" for token_input in TOKEN_INPUTS)):
            assert torch.equal(packed[name][start:stop], result[name]), (name, row)
        weight_gradient += result["d_norm_weight"]
    assert relative_error(packed["d_norm_weight"], weight_gradient) < 1e-5


def outputs_and_gradients_with_ones(function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    output = function(**leaves)
    gradients = torch.autograd.grad(output.sum(), list(leaves.values()))
    return {"output": output.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


@given(length=st.integers(1, 70), normalize=st.booleans(), seed=st.integers(0, 3))
def test_permuting_the_tokens_of_a_row_permutes_the_result(length: int, normalize: bool, seed: int) -> None:
    inputs, layout = small_inputs([length], seed=seed)
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    permuted = {name: tensor[order] if name in TOKEN_INPUTS else tensor for name, tensor in inputs.items()}
    expected = outputs_and_gradients_with_ones(op(layout, normalize=normalize), inputs)
    actual = outputs_and_gradients_with_ones(op(layout, normalize=normalize), permuted)
    for name, value in expected.items():
        assert relative_error(actual[name], value if name == "d_norm_weight" else value[order]) < 1e-10, name


@given(lengths=lengths_strategy, shift=st.floats(-5000, 5000), options=switches)
@example(lengths=[3, 65], shift=5000.0, options={"feature_map": "elu1", "normalize": False, "direction": "bidirectional"})
def test_adding_a_constant_to_a_rows_gates_changes_nothing(lengths: list[int], shift: float, options: Options) -> None:
    inputs, layout = small_inputs(lengths)
    expected = outputs_and_gradients(op(layout, **options), inputs)
    actual = outputs_and_gradients(op(layout, **options), {**inputs, "key_gate": inputs["key_gate"] + shift})
    assert_equal(actual, expected, 1e-9)


@given(lengths=lengths_strategy, options=switches)
def test_no_gate_equals_any_constant_gate(lengths: list[int], options: Options) -> None:
    inputs, layout = small_inputs(lengths)
    expected = outputs_and_gradients(op(layout, **options), {**inputs, "key_gate": torch.full_like(inputs["key_gate"], 2.5)})
    actual = outputs_and_gradients(op(layout, **options), {**inputs, "key_gate": None})
    expected.pop("d_key_gate")
    assert_equal(actual, expected)


@given(lengths=lengths_strategy, feature_map=st.sampled_from(["elu1", "relu"]), normalize=st.booleans())
def test_gate_gradient_sums_to_zero_over_each_row(lengths: list[int], feature_map: str, normalize: bool) -> None:
    inputs, layout = small_inputs(lengths)
    gradient = outputs_and_gradients(op(layout, feature_map=feature_map, normalize=normalize), inputs)["d_key_gate"]
    for row in gradient.split(layout.row_lengths):
        assert torch.all(row.sum(0).abs() <= 1e-10 * (1 + row.abs().sum(0)))


def test_gate_gradient_has_the_closed_form() -> None:
    inputs, layout = small_inputs([9])
    query, key, value, gate = (inputs[name][:, 0].detach() for name in ("query", "key", "value", "key_gate"))
    phi = lambda x: torch.where(x > 0, x + 1, x.exp())  # noqa: E731
    weighting = torch.randn(9, 3, dtype=torch.float64)
    bare = {name: inputs[name][:, :1].detach().requires_grad_() for name in ("query", "key", "value", "key_gate")}
    output = op(layout, normalize=False)(**bare, output_gate=None, norm_weight=None)
    (actual,) = torch.autograd.grad((output[:, 0] * weighting).sum(), bare["key_gate"])
    a = torch.softmax(gate, 0)
    state = torch.einsum("t,tk,tv->kv", a, phi(key), value)
    d_state = torch.einsum("tk,tv->kv", phi(query), weighting)
    expected = a * (torch.einsum("tk,kv,tv->t", phi(key), d_state, value) - (state * d_state).sum())
    assert relative_error(actual[:, 0], expected) < 1e-12


@given(lengths=lengths_strategy, options=switches, seed=st.integers(0, 3))
def test_silenced_token_has_no_influence_but_still_an_output(lengths: list[int], options: Options, seed: int) -> None:
    inputs, layout = small_inputs(lengths, seed=seed, silent_fraction=0.3)
    is_silent = inputs["key_gate"] == -torch.inf
    other = {name: tensor.detach().clone() for name, tensor in inputs.items()}
    other["key"][is_silent] += 100
    other["value"][is_silent] -= 100
    expected, actual = (outputs_and_gradients(op(layout, **options), tensors) for tensors in (inputs, other))
    assert_equal(actual, expected)
    assert not expected["output"].isnan().any()
    for name in ("d_key", "d_value", "d_key_gate"):
        assert torch.all(expected[name][is_silent] == 0), name


@given(options=switches)
def test_row_of_silenced_tokens_gives_zeros_and_zero_gradients(options: Options) -> None:
    inputs, layout = small_inputs([3, 4])
    gate = inputs["key_gate"].detach().clone()
    gate[3:] = -torch.inf
    result = outputs_and_gradients(op(layout, **options), {**inputs, "key_gate": gate})
    for name, value in result.items():
        assert value.isfinite().all(), name
        if name != "d_norm_weight":
            assert torch.all(value[3:] == 0), name


@given(lengths=lengths_strategy, factor=st.floats(-3, 3), options=switches)
def test_linear_in_value_without_the_norm(lengths: list[int], factor: float, options: Options) -> None:
    inputs, layout = small_inputs(lengths)
    other = torch.randn(inputs["value"].shape, dtype=torch.float64)

    def without_norm(value: Tensor) -> Tensor:
        return op(layout, **options)(**{**inputs, "value": value, "norm_weight": None})

    combined = without_norm(inputs["value"] + factor * other)
    assert relative_error(combined, without_norm(inputs["value"]) + factor * without_norm(other)) < 1e-11


@given(lengths=lengths_strategy, exponent=st.integers(-4, 4), options=switches)
def test_scaling_value_by_c_and_eps_by_c_squared_changes_nothing(lengths: list[int], exponent: int, options: Options) -> None:
    inputs, layout = small_inputs(lengths, torch.float32)
    c = 2.0**exponent
    expected = op(layout, eps=1e-3, **options)(**inputs)
    actual = op(layout, eps=1e-3 * c * c, **options)(**{**inputs, "value": c * inputs["value"]})
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_no_tokens_give_no_output_and_zero_gradients(lengths: list[int], direction: str) -> None:
    inputs, layout = small_inputs(lengths)
    result = outputs_and_gradients(op(layout, direction=direction), inputs)
    assert result["output"].shape == (0, 2, 3)
    assert torch.equal(result["d_norm_weight"], torch.zeros(2, 3, dtype=torch.float64))


@given(lengths=lengths_strategy, options=switches)
def test_strided_views_equal_contiguous_inputs(lengths: list[int], options: Options) -> None:
    inputs, layout = small_inputs(lengths)
    fused = torch.cat([inputs[name].flatten(1) for name in ("query", "key", "value")], dim=1).detach()
    query, key, value = (part.unflatten(1, (2, -1)) for part in fused.split([10, 10, 6], dim=1))
    expected = outputs_and_gradients(op(layout, **options), inputs)
    assert_equal(outputs_and_gradients(op(layout, **options), {**inputs, "query": query, "key": key, "value": value}), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_against_fp64_is_one_rounding(dtype: torch.dtype) -> None:
    inputs, layout = attention_inputs([0, 1, 65, 300], num_heads=2, key_dim=16, value_dim=16, dtype=dtype)
    assert_within_budget(op(layout), op(layout), inputs)
    exact = op(layout)(**{name: tensor.detach().double() for name, tensor in inputs.items()})
    assert relative_error(op(layout)(**inputs), exact) < 2 * torch.finfo(dtype).eps + 5e-6


def test_feature_map_keeps_small_values() -> None:
    inputs, layout = small_inputs([5], torch.float32)
    far = {**inputs, "query": inputs["query"].detach() - 17}
    exact = op(layout)(**{name: tensor.detach().double() for name, tensor in far.items()})
    assert relative_error(op(layout)(**far), exact) < 1e-5


def test_a_late_large_gate_does_not_erase_earlier_causal_prefixes() -> None:
    inputs, layout = small_inputs([6])
    gate = inputs["key_gate"].detach().clone()
    gate[-1] = 5000.0
    alone = {name: tensor[:5] if name in TOKEN_INPUTS else tensor for name, tensor in inputs.items()}
    actual = op(layout, direction="causal")(**{**inputs, "key_gate": gate})[:5]
    assert relative_error(actual, op(JaggedLayout.from_lengths([5]), direction="causal")(**alone)) < 1e-12


def test_a_row_of_131072_among_tiny_ones() -> None:
    lengths = [1, 0, 131_072, 2]
    inputs, layout = attention_inputs(lengths, num_heads=1, key_dim=4, value_dim=4, dtype=torch.float32)
    with torch.no_grad():
        output = op(layout)(**inputs)
        exact = op(layout)(**{name: tensor.double() for name, tensor in inputs.items()})
    assert relative_error(output, exact) < 1e-5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(3, 2, 4)}, "key must have shape"),
        ({"value": torch.zeros(3, 2, 3, dtype=torch.float16)}, "value must have the dtype of query"),
        ({"key_gate": torch.zeros(3, 1)}, "key_gate must have shape"),
        ({"offsets": torch.tensor([0, 2])}, "offsets must rise from 0 to the number of tokens 3"),
        ({"offsets": torch.tensor([0, 3], dtype=torch.int32)}, "offsets must be int64"),
        ({"direction": "backward"}, "direction must be one of"),
        ({"direction": "causal", "normalize": False}, "normalize must be True"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    x = torch.zeros(3, 2, 5)
    arguments: dict[str, object] = {"query": x, "key": x, "value": torch.zeros(3, 2, 3), "offsets": torch.tensor([0, 1, 3])}
    arguments |= {"key_gate": None, "output_gate": None, "norm_weight": None}
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**{**arguments, **change}, backend=Backend.REFERENCE)  # type: ignore[arg-type]


def test_triton_backend_never_falls_back() -> None:
    inputs, layout = small_inputs([3])
    with pytest.raises(NotImplementedError, match="Triton"):
        gated_linear_attention(**inputs, offsets=layout.offsets, backend=Backend.TRITON)
