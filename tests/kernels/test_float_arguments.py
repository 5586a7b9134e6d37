"""Every op refuses what is no tensor of floats, no offsets, no layout or no eps, by name and on both backends, before a kernel reads it."""

import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor

import gbla_kernels as ops
from gbla_kernels import Backend, JaggedLayout

OFFSETS = torch.tensor([0, 3, 7])
ROWS = JaggedLayout.from_offsets(OFFSETS)
SHAPES = {
    "gated_linear_attention": {
        **dict.fromkeys(("query", "key", "value", "output_gate"), (7, 2, 8)),
        **{"key_gate": (7, 2), "norm_weight": (2, 8)},
    },
    "gated_linear_attention_packed": {"projection": (7, 66), "norm_weight": (2, 8)},
    "causal_conv1d": {"x": (7, 8), "weight": (8, 4), "bias": (8,)},
    "rms_norm_causal_conv1d": {"x": (7, 8), "norm_weight": (8,), "weight": (8, 4), "bias": (8,)},
    "rotary_embedding": dict.fromkeys(("query", "key"), (7, 2, 8)),
    "keyed_dropout": dict.fromkeys(("x", "residual"), (7, 8)),
    "jagged_cross_attention": dict.fromkeys(("query", "key", "value"), (7, 2, 8)),
    "jagged_cross_attention_packed": {"query": (7, 2, 8), "key_value": (7, 2, 2, 8)},
}
"""Shapes of the float arguments of each op."""
OTHERS: dict[str, dict[str, Any]] = {
    "gated_linear_attention": {"offsets": OFFSETS},
    "gated_linear_attention_packed": {"offsets": OFFSETS, "num_heads": 2, "key_dim": 8, "value_dim": 8},
    "causal_conv1d": {"offsets": OFFSETS},
    "rms_norm_causal_conv1d": {"offsets": OFFSETS},
    "rotary_embedding": {"positions": torch.arange(7)},
    # evaluation, which drops nothing, refuses what training refuses
    "keyed_dropout": {"token_keys": None, "probability": 0.5, "salt": 0},
    "jagged_cross_attention": {"query_layout": ROWS, "key_layout": ROWS},
    "jagged_cross_attention_packed": {"query_layout": ROWS, "key_layout": ROWS},
}
OPS_WITH_EPS = ["gated_linear_attention", "gated_linear_attention_packed", "rms_norm_causal_conv1d"]
OPS_WITH_OFFSETS = ["gated_linear_attention", "gated_linear_attention_packed", "causal_conv1d", "rms_norm_causal_conv1d"]
OFFSETS_OR_POSITIONS = [*((op, "offsets") for op in OPS_WITH_OFFSETS), ("rotary_embedding", "positions"), ("keyed_dropout", "token_keys")]
NO_LAYOUT = [*((op, name) for op in OTHERS for name in OTHERS[op] if name.endswith("layout")), *((op, "layout") for op in OPS_WITH_OFFSETS)]
NO_EPS: list[object] = [-1, -1e-6, 0, 0.0, math.nan, math.inf, -math.inf, "1e-6", torch.tensor(1e-6)]


def call(op: str, backend: Backend, is_integer: Callable[[str], bool] = lambda name: False, **changes: object) -> object:
    tensors = {name: torch.ones(shape, dtype=torch.int64 if is_integer(name) else torch.float32) for name, shape in SHAPES[op].items()}
    return getattr(ops, op)(**{**tensors, **OTHERS[op], **changes}, backend=backend)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("op", "argument"), [(op, name) for op, shapes in SHAPES.items() for name in shapes])
def test_integers_are_refused_by_name(op: str, argument: str, backend: Backend) -> None:
    assert isinstance(call(op, Backend.REFERENCE), Tensor | tuple)
    with pytest.raises(ValueError, match=rf"^{argument} must .*, got torch\.int64"):
        call(op, backend, lambda name: name == argument)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("op", "argument"), [*((op, name) for op in SHAPES for name in SHAPES[op]), *OFFSETS_OR_POSITIONS])
def test_a_list_is_refused_by_name(op: str, argument: str, backend: Backend) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must be a tensor, got list \[0, 3, 7\]; torch.as_tensor makes one$"):
        call(op, backend, **{argument: [0, 3, 7]})


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("op", "argument"), NO_LAYOUT)
def test_offsets_are_no_layout(op: str, argument: str, backend: Backend) -> None:
    for given in (OFFSETS, [3, 4]):
        with pytest.raises(ValueError, match=rf"^{argument} must be a JaggedLayout, got {type(given).__name__} .*from_offsets makes one$"):
            call(op, backend, **{argument: given})


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("op", OPS_WITH_EPS)
def test_an_eps_that_makes_no_norm_is_refused(op: str, backend: Backend) -> None:
    for eps in NO_EPS:
        with pytest.raises(ValueError, match=r"^eps must be a finite float above 0, or None for 1e-6, got "):
            call(op, backend, eps=eps)
    # without a norm it is not read, and none the better
    if op != "rms_norm_causal_conv1d":
        with pytest.raises(ValueError, match=r"^eps must be .*, got nan$"):
            call(op, backend, eps=math.nan, norm_weight=None)


def test_a_compiled_call_takes_and_refuses_the_same_eps() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(partial(call, "rms_norm_causal_conv1d", Backend.REFERENCE), backend="eager", dynamic=True)
    for eps in (1e-6, 0.1):
        assert torch.equal(compiled(eps=eps), call("rms_norm_causal_conv1d", Backend.REFERENCE, eps=eps))
    for eps in (-1.0, math.nan):
        with pytest.raises(ValueError, match="eps must be a finite float above 0"):
            compiled(eps=eps)


def test_no_op_with_eps_or_offsets_is_left_out() -> None:
    parameters = {op: signature(getattr(ops, op)).parameters for op in SHAPES}
    assert OPS_WITH_EPS == [op for op in SHAPES if "eps" in parameters[op]]
    assert OPS_WITH_OFFSETS == [op for op in SHAPES if "offsets" in parameters[op]] == [op for op in SHAPES if "layout" in parameters[op]]


def test_no_op_is_left_out() -> None:
    assert set(SHAPES) == {name for name in ops.__all__ if name[0].islower()}
