"""Tolerances that come from fp64: an implementation may err at most twice as much as its dtype must."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Op = Callable[..., Tensor]

FACTOR = 2.0
"""Of the error that values must have which are computed in fp32 and rounded once."""
FUSED_ATTENTION_FACTORS = {"output": FACTOR, "d_query": 2 * FACTOR, "d_key": 2 * FACTOR, "d_value": FACTOR}
"""Fused softmax attention rounds the gradients of scores to the dtype of its inputs before their products with query and key, and takes
``sum(output * d_output)``, which they cancel against, from the rounded output: in rows of two or three tokens that is 2.5 times the
error of one rounding."""


def relative_error(actual: Tensor, exact: Tensor) -> float:
    """``|actual - exact| / |exact|`` in the Euclidean norm; 0 when both are zero or empty."""
    difference = torch.linalg.vector_norm(actual.detach().double() - exact.detach().double())
    scale = torch.linalg.vector_norm(exact.detach().double())
    return float(difference / scale) if float(scale) > 0 else float(difference)


def rounding_error(dtype: torch.dtype) -> float:
    """Relative error of values that are rounded once: half a unit in the last place at most, half of that in the mean."""
    return torch.finfo(dtype).eps / 4


def outputs_and_gradients(op: Op, inputs: Mapping[str, Tensor | None], seed: int = 0) -> dict[str, Tensor]:
    """``{"output": y}`` and ``{"d_<name>": gradient}`` of a random weighting of ``y = op(**inputs)``."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    output = op(**{name: leaves.get(name) for name in inputs})
    weighting = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(output)
    gradients = torch.autograd.grad((output * weighting).sum(), list(leaves.values()))
    return {"output": output.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def assert_within_budget(op: Op, reference: Op, inputs: Mapping[str, Tensor | None], *, factor: float = FACTOR, seed: int = 0) -> None:
    """Compare output and every gradient of ``op`` with ``reference`` in fp64.

    The budget of each is ``factor`` times the error of ``reference`` itself on the same inputs in their own dtype, and at
    least ``rounding_error`` of that dtype.

    Raises:
        AssertionError: names the tensor, its error and its budget.
    """
    exact = outputs_and_gradients(reference, {name: None if x is None else x.detach().double() for name, x in inputs.items()}, seed)
    rounded = outputs_and_gradients(reference, inputs, seed)
    actual = outputs_and_gradients(op, inputs, seed)
    assert_errors_within(actual, exact, rounded, dict.fromkeys(exact, factor))


def assert_errors_within(
    actual: Mapping[str, Tensor], exact: Mapping[str, Tensor], rounded: Mapping[str, Tensor], factors: Mapping[str, float]
) -> None:
    """Compare tensors of the same names.

    Args:
        actual: what is judged.
        exact: in fp64.
        rounded: computed from the same inputs as ``actual``, in fp32, and rounded once to the dtype of ``actual``.
        factors: of the error of ``rounded`` that each may have; the least budget is ``rounding_error``.

    Raises:
        AssertionError: names the tensor, its error and its budget.
    """
    for name, value in exact.items():
        budget = max(factors[name] * relative_error(rounded[name], value), rounding_error(actual[name].dtype))
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: relative error {error:.3g} exceeds its budget {budget:.3g}"
