"""Every op refuses integers where its documentation says float, by name and on both backends, before a kernel could read them."""

from collections.abc import Callable
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


def call(op: str, backend: Backend, is_integer: Callable[[str], bool]) -> object:
    tensors = {name: torch.ones(shape, dtype=torch.int64 if is_integer(name) else torch.float32) for name, shape in SHAPES[op].items()}
    return getattr(ops, op)(**tensors, **OTHERS[op], backend=backend)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize(("op", "argument"), [(op, name) for op, shapes in SHAPES.items() for name in shapes])
def test_integers_are_refused_by_name(op: str, argument: str, backend: Backend) -> None:
    assert isinstance(call(op, Backend.REFERENCE, lambda name: False), Tensor | tuple)
    with pytest.raises(ValueError, match=rf"^{argument} must .*, got torch\.int64"):
        call(op, backend, lambda name: name == argument)


def test_no_op_is_left_out() -> None:
    assert set(SHAPES) == {name for name in ops.__all__ if name[0].islower()}
