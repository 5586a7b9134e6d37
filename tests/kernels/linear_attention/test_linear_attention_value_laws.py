"""What a change of the values does to every gradient: the laws of ``attention_laws.py`` on values compare outputs alone."""

from dataclasses import replace

import pytest
import torch

from gbla_kernels import Backend
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.attention_subject import Subject, Variant, assert_same_bits, assert_within, output_weights, results

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), *([] if INTERPRETED else [pytest.mark.gpu])]

REFERENCE = Subject(backend=Backend.REFERENCE, dtype=torch.float64)
TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, num_heads=1, device="cpu" if INTERPRETED else "cuda")
LENGTHS = [3, SPLIT + 1, 0, 70]
backends = pytest.mark.parametrize("subject", [REFERENCE, TRITON], ids=["reference", "triton"])
normalized = pytest.mark.parametrize("normalize", [True, False], ids=["normalized", "sums"])


@backends
@normalized
def test_scaling_value_by_c_and_eps_by_c_squared_scales_the_gradient_to_value_alone(subject: Subject, normalize: bool) -> None:
    subject = replace(subject, variant=Variant(normalize=normalize))
    inputs, layout = subject.inputs(LENGTHS, 0)
    expected = results(subject.op(layout, eps=1e-3), inputs)
    # a power of two: nothing is rounded anew
    for c in (4.0, 0.5):
        scaled = {**inputs, "value": c * inputs["value"]}
        actual = results(subject.op(layout, eps=1e-3 * c * c), scaled)
        assert_same_bits({**actual, "d_value": c * actual["d_value"]}, expected)


@backends
@normalized
@pytest.mark.parametrize("absent", [("norm_weight",), ("key_gate", "output_gate", "norm_weight")], ids=["gates", "bare"])
def test_without_the_norm_gradients_are_linear_in_value_and_that_to_value_does_not_depend_on_it(
    subject: Subject, normalize: bool, absent: tuple[str, ...]
) -> None:
    subject = replace(subject, variant=Variant(normalize=normalize, absent=absent))
    inputs, layout = subject.inputs(LENGTHS, 1)
    # small integers: their sum is exact
    value, other = (4 * inputs["value"]).round(), (4 * inputs["value"].flip(-1)).round()
    d_output = output_weights(value)
    sides = [{**inputs, "value": x} for x in (value + 2 * other, value, other)]
    combined, first, second = (subject.run(side, layout, d_output=d_output) for side in sides)
    exact = subject.exact(sides[0], layout, d_output=d_output)
    budget = subject.budget(sides[0], layout, exact, d_output=d_output)
    linear = {name: x.double() + 2 * second[name].double() for name, x in first.items() if name != "d_value"}
    assert_within({name: combined[name] for name in linear}, linear, budget, factor=4.0)
    assert_same_bits({"d_value": combined["d_value"]}, {"d_value": first["d_value"]})
