"""Every op refuses a backend that is no ``Backend``: a string would run the reference, or a kernel, whatever it says."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import gbla_kernels as ops
from gbla_kernels import JaggedLayout

OFFSETS = torch.tensor([0, 3, 7])
ROWS = JaggedLayout.from_offsets(OFFSETS)


def heads() -> Tensor:
    return torch.randn(7, 2, 8)


CALLS: dict[str, Callable[[object], object]] = {
    "gated_linear_attention": lambda backend: ops.gated_linear_attention(
        heads(), heads(), heads(), None, None, None, OFFSETS, backend=backend
    ),
    "gated_linear_attention_packed": lambda backend: ops.gated_linear_attention_packed(
        torch.randn(7, 66), None, OFFSETS, num_heads=2, key_dim=8, value_dim=8, backend=backend
    ),
    "causal_conv1d": lambda backend: ops.causal_conv1d(torch.randn(7, 8), torch.randn(8, 4), None, OFFSETS, backend=backend),
    "rms_norm_causal_conv1d": lambda backend: ops.rms_norm_causal_conv1d(
        torch.randn(7, 8), torch.ones(8), torch.randn(8, 4), None, OFFSETS, backend=backend
    ),
    "rotary_embedding": lambda backend: ops.rotary_embedding(heads(), heads(), torch.arange(7), backend=backend),
    "keyed_dropout": lambda backend: ops.keyed_dropout(torch.randn(7, 8), None, 0.5, 0, backend=backend),
    "jagged_cross_attention": lambda backend: ops.jagged_cross_attention(heads(), heads(), heads(), ROWS, ROWS, backend=backend),
    "jagged_cross_attention_packed": lambda backend: ops.jagged_cross_attention_packed(
        heads(), torch.randn(7, 2, 2, 8), ROWS, ROWS, backend=backend
    ),
}


@pytest.mark.parametrize("op", CALLS)
def test_a_string_is_no_backend(op: str) -> None:
    CALLS[op](ops.Backend.REFERENCE)
    for backend in ("triton", "reference", None):
        with pytest.raises(ValueError, match=r"backend must be Backend\.REFERENCE or Backend\.TRITON, got"):
            CALLS[op](backend)


def test_no_op_is_left_out() -> None:
    assert set(CALLS) == {name for name in ops.__all__ if name[0].islower()}
