"""An implementation of gated linear attention under test, and what fp64 says about how exact it must be."""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.api import gated_linear_attention
from gbla_kernels.testing.error_budget import relative_error
from gbla_kernels.testing.inputs import attention_inputs

TOKEN_INPUTS = ("query", "key", "value", "key_gate", "output_gate")
"""Arguments with one entry per token; ``norm_weight`` has none."""
FLOOR = {torch.float64: 1e-11, torch.float32: 2.0**-20, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Relative error that is always allowed: three tf32 products keep 21 bits, half precision is half a unit in the last place."""

Tensors = dict[str, Any]
"""Arguments by name: tensors, and None for what is absent."""
Results = dict[str, Tensor]
Op = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Which form of the op; ``absent`` names the optional tensors that are None."""

    feature_map: Literal["elu1", "relu"] = "elu1"
    normalize: bool = True
    direction: Literal["bidirectional", "causal"] = "bidirectional"
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A backend with the dtype, the device and the widths that it is tested with."""

    backend: Backend
    dtype: torch.dtype
    device: str = "cpu"
    num_heads: int = 2
    key_dim: int = 20
    value_dim: int = 24
    variant: Variant = field(default_factory=Variant)

    def inputs(self, lengths: Sequence[int], seed: int, silent_fraction: float = 0.0) -> tuple[Tensors, JaggedLayout]:
        """Random inputs by argument name, and their layout."""
        tensors, layout = attention_inputs(
            lengths,
            num_heads=self.num_heads,
            key_dim=self.key_dim,
            value_dim=self.value_dim,
            dtype=self.dtype,
            device=self.device,
            seed=seed,
            silent_fraction=silent_fraction,
        )
        return {name: None if name in self.variant.absent else tensor.detach() for name, tensor in tensors.items()}, layout

    def op(self, layout: JaggedLayout, *, has_layout: bool = True, eps: float = 1e-6) -> Op:
        """The op of the input tensors alone; without layout it gets the offsets only."""
        return partial(
            gated_linear_attention,
            offsets=layout.offsets,
            layout=layout if has_layout else None,
            feature_map=self.variant.feature_map,
            normalize=self.variant.normalize,
            direction=self.variant.direction,
            eps=eps,
            backend=self.backend,
        )

    def run(self, inputs: Tensors, layout: JaggedLayout, *, d_output: Tensor | None = None, has_layout: bool = True) -> Results:
        """Output and every gradient, see ``results``."""
        return results(self.op(layout, has_layout=has_layout), inputs, d_output)

    def exact(self, inputs: Tensors, layout: JaggedLayout, *, d_output: Tensor | None = None) -> Results:
        """The same from the reference in fp64."""
        reference = replace(self, backend=Backend.REFERENCE)
        return reference.run({name: None if x is None else x.double() for name, x in inputs.items()}, layout, d_output=d_output)

    def budget(self, inputs: Tensors, layout: JaggedLayout, exact: Results, *, d_output: Tensor | None = None) -> dict[str, float]:
        """Twice the error of the reference that computes in fp32 (fp64 for fp64) and rounds once, at least ``FLOOR``.

        A gradient of a wider dtype than query is rounded to that of query first: so are the operands of the kernels' dots.
        """
        rounded = replace(self, backend=Backend.REFERENCE).run(inputs, layout, d_output=d_output)
        budget = {}
        for name, value in rounded.items():
            floor = max(FLOOR[value.dtype], FLOOR[self.dtype])
            budget[name] = max(2 * relative_error(value.to(self.dtype), exact[name]), floor)
        return budget


def results(op: Op, inputs: Tensors, d_output: Tensor | None = None) -> Results:
    """``{"output": y}`` and ``{"d_<name>": gradient}`` of ``sum(y * d_output)``; without ``d_output``, of random weights."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items() if tensor is not None}
    output = op(**{name: leaves.get(name) for name in inputs})
    if d_output is None:
        d_output = output_weights(output)
    gradients = torch.autograd.grad(output, list(leaves.values()), d_output.to(output.dtype))
    return {"output": output.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def output_weights(like: Tensor, seed: int = 0) -> Tensor:
    """Random ``(L, H, V)`` fp32 weights of an output, the same for every backend and device."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like.device)


def assert_within(actual: Results, expected: Results, budget: Mapping[str, float], factor: float = 1.0) -> None:
    """Raise AssertionError, which names the tensor, where ``actual`` is further from ``expected`` than ``factor * budget``."""
    assert actual.keys() == expected.keys(), f"{sorted(actual)} are not {sorted(expected)}"
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= factor * budget[name], f"{name}: relative error {error:.3g} exceeds its budget {factor * budget[name]:.3g}"


def assert_same_bits(actual: Results, expected: Results) -> None:
    """Raise AssertionError, which names the tensor, unless all results are equal; NaN equals nothing."""
    assert actual.keys() == expected.keys(), f"{sorted(actual)} are not {sorted(expected)}"
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype, f"{name}: {actual[name].dtype} is not {value.dtype}"
        assert torch.equal(actual[name], value), f"{name}: differs in {int((actual[name] != value).sum())} of {value.numel()} places"
