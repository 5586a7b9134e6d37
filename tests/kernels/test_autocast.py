"""Autocast changes no op: each computes in fp32 and rounds to the dtypes of its own inputs, forward and backward.

Linear attention and cross-attention of separate tensors are held to this in their own folders.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from gbla_kernels import (
    Backend,
    JaggedLayout,
    causal_conv1d,
    gated_linear_attention_packed,
    jagged_cross_attention_packed,
    keyed_dropout,
    rms_norm_causal_conv1d,
    rotary_embedding,
)
from gbla_kernels.dispatch import INTERPRETED

# where kernels are compiled, "-m gpu" runs these too
pytestmark = [] if INTERPRETED else pytest.mark.gpu

DEVICE, HALF = ("cpu", torch.bfloat16) if INTERPRETED else ("cuda", torch.float16)
LENGTHS = [0, 5, 70, 1]
NUM_TOKENS = sum(LENGTHS)
HEADS = (NUM_TOKENS, 2, 16)
SHAPES = {
    "linear_attention_packed": ((NUM_TOKENS, 130), (2, 16)),
    "causal_conv1d": ((NUM_TOKENS, 20), (20, 4), (20,)),
    "rms_norm_causal_conv1d": ((NUM_TOKENS, 20), (20,), (20, 4), (20,)),
    "rotary": (HEADS, HEADS),
    "keyed_dropout": ((NUM_TOKENS, 20),),
    "cross_attention_packed": (HEADS, (NUM_TOKENS, 2, 2, 16)),
}
"""Of the tensors of each op that want gradients, in order."""


def op_of(name: str, backend: Backend) -> Callable[..., Any]:
    """The op as a function of these tensors."""
    rows = JaggedLayout.from_lengths(LENGTHS).to(DEVICE)
    layout = {"offsets": rows.offsets, "layout": rows}
    ops = {
        "linear_attention_packed": partial(gated_linear_attention_packed, num_heads=2, key_dim=16, value_dim=16, **layout),
        "causal_conv1d": partial(causal_conv1d, **layout),
        "rms_norm_causal_conv1d": partial(rms_norm_causal_conv1d, **layout),
        "rotary": partial(rotary_embedding, positions=rows.positions),
        "keyed_dropout": partial(keyed_dropout, token_keys=torch.arange(NUM_TOKENS, device=DEVICE), probability=0.3, salt=1),
        "cross_attention_packed": partial(jagged_cross_attention_packed, query_layout=rows, key_layout=rows),
    }
    return partial(ops[name], backend=backend)


@pytest.mark.parametrize("backend", list(Backend))
@pytest.mark.parametrize("name", SHAPES)
def test_outputs_and_gradients_are_those_without_autocast(name: str, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(DEVICE) for shape in SHAPES[name]]
    op = op_of(name, backend)

    def results(is_on: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in tensors]
        # forward alone, as in training: autograd runs backward in the dtypes of forward
        with torch.autocast(DEVICE, dtype=HALF, enabled=is_on):
            outputs = op(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad([y.square().sum() for y in outputs], leaves)]

    for actual, expected in zip(results(True), results(False), strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        assert torch.equal(actual, expected)
