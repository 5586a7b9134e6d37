"""Kernels run on the device of their tensors, whichever device is the current one."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from gbla_kernels import (
    Backend,
    JaggedLayout,
    causal_conv1d,
    gated_linear_attention,
    jagged_cross_attention_packed,
    keyed_dropout,
    rms_norm_causal_conv1d,
    rotary_embedding,
)
from gbla_kernels.testing.inputs import attention_inputs, conv_inputs

pytestmark = [pytest.mark.multi_gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

LENGTHS = [0, 5, 300, 1700, 1]
Call = tuple[Callable[..., Tensor], list[Tensor]]
"""An op and what it takes that wants gradients."""


def attention(device: torch.device) -> Call:
    tensors, layout = attention_inputs(LENGTHS, num_heads=2, key_dim=64, value_dim=64, dtype=torch.bfloat16, device=device)
    return partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.TRITON), list(tensors.values())


def convolution(device: torch.device) -> Call:
    tensors, layout = conv_inputs(LENGTHS, dim=64, num_taps=4, dtype=torch.bfloat16, device=device)
    return partial(causal_conv1d, offsets=layout.offsets, layout=layout, backend=Backend.TRITON), list(tensors.values())


def normed_convolution(device: torch.device) -> Call:
    tensors, layout = conv_inputs(LENGTHS, dim=64, num_taps=4, dtype=torch.bfloat16, device=device)
    op = partial(rms_norm_causal_conv1d, offsets=layout.offsets, layout=layout, backend=Backend.TRITON)
    return op, [tensors["x"], torch.ones(64, device=device, requires_grad=True), tensors["weight"], tensors["bias"]]


def cross_attention(device: torch.device) -> Call:
    queries, keys = (JaggedLayout.from_lengths(lengths).to(device) for lengths in ([3, 0, 4, 2, 1], LENGTHS))
    x = [torch.randn(*shape, dtype=torch.bfloat16, device=device) for shape in ((10, 2, 64), (keys.num_tokens, 2, 2, 64))]
    op = partial(jagged_cross_attention_packed, query_layout=queries, key_layout=keys, backend=Backend.TRITON)
    return op, [t.requires_grad_() for t in x]


def dropout(device: torch.device) -> Call:
    keys = torch.arange(100, device=device)
    x = torch.randn(100, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    return partial(keyed_dropout, token_keys=keys, probability=0.3, salt=1, backend=Backend.TRITON), [x]


def rotary(device: torch.device) -> Call:
    layout = JaggedLayout.from_lengths(LENGTHS).to(device)
    x = [torch.randn(layout.num_tokens, 2, 64, dtype=torch.bfloat16, device=device, requires_grad=True) for _ in range(2)]
    op = partial(rotary_embedding, positions=layout.positions, backend=Backend.TRITON)
    return lambda *tensors: torch.cat(op(*tensors)), x


OPS = (attention, convolution, normed_convolution, cross_attention, dropout, rotary)


@pytest.mark.parametrize("make", OPS, ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_kernels_run_where_their_tensors_are(make: Callable[[torch.device], Call], is_compiled: bool) -> None:
    results = []
    for current in (1, 0):
        op, tensors = make(torch.device("cuda", 1))
        torch.manual_seed(0)
        with torch.no_grad():
            for x in tensors:
                x.copy_(torch.randn(x.shape))
        with torch.cuda.device(current):
            y = (torch.compile(op) if is_compiled else op)(*tensors)
            gradients = torch.autograd.grad(y.float().square().sum(), tensors)
        results.append([y, *gradients])
    for there, from_elsewhere in zip(*results, strict=True):
        assert from_elsewhere.device == torch.device("cuda", 1)
        assert torch.equal(there, from_elsewhere)
