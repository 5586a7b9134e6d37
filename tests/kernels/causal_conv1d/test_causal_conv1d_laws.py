"""Laws of the causal convolution, each for the output and every gradient."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, causal_conv1d
from gbla_kernels.testing.error_budget import outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import NASTY_LENGTHS, conv_inputs

lengths_strategy = st.lists(st.one_of(st.sampled_from(NASTY_LENGTHS), st.integers(0, 20)), min_size=1, max_size=5)


def rows_by_torch_conv(lengths: list[int], activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row through ``torch.nn.functional.conv1d`` with zeros before its first token."""
    rows = []
    for row in x.split(lengths):
        padded = F.pad(row.T, (weight.shape[1] - 1, 0))
        y = F.conv1d(padded[None], weight[:, None], bias, groups=x.shape[1])[0].T if len(row) else row
        rows.append(F.silu(y) if activation else y)
    return torch.cat(rows) + 0 * (x.sum() + weight.sum() + (0 if bias is None else bias.sum()))


@given(lengths=lengths_strategy, num_taps=st.integers(1, 8), activation=st.sampled_from(["silu", None]), has_bias=st.booleans())
def test_equals_torch_conv_of_each_row(lengths: list[int], num_taps: int, activation: str | None, has_bias: bool) -> None:
    inputs, layout = conv_inputs(lengths, dim=3, num_taps=num_taps, dtype=torch.float64)
    tensors: dict[str, Tensor | None] = dict(inputs)
    if not has_bias:
        tensors["bias"] = None
    op = partial(causal_conv1d, offsets=layout.offsets, layout=layout, activation=activation, backend=Backend.REFERENCE)
    actual = outputs_and_gradients(op, tensors)
    expected = outputs_and_gradients(partial(rows_by_torch_conv, lengths, activation), tensors)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-12, name


@given(lengths=lengths_strategy)
def test_layout_is_optional(lengths: list[int]) -> None:
    inputs, layout = conv_inputs(lengths, dim=2, num_taps=4, dtype=torch.float32)
    with_layout = causal_conv1d(**inputs, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE)
    assert torch.equal(with_layout, causal_conv1d(**inputs, offsets=layout.offsets, backend=Backend.REFERENCE))


def test_no_token_reads_across_a_row_start() -> None:
    inputs, layout = conv_inputs([3, 5, 1], dim=2, num_taps=4, dtype=torch.float32)
    changed = inputs["x"].detach().clone()
    changed[:3] += 1e6
    run = partial(causal_conv1d, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE)
    after = run(**{**inputs, "x": changed})
    assert torch.equal(run(**inputs)[3:], after[3:])


def test_no_tokens_give_zero_gradients() -> None:
    inputs, layout = conv_inputs([0, 0], dim=2, num_taps=4, dtype=torch.float32)
    result = outputs_and_gradients(partial(causal_conv1d, offsets=layout.offsets, backend=Backend.REFERENCE), inputs)
    assert torch.equal(result["d_weight"], torch.zeros(2, 4))
    assert torch.equal(result["d_bias"], torch.zeros(2))


def test_bad_arguments_are_named() -> None:
    inputs, layout = conv_inputs([3], dim=2, num_taps=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \(D, R\)"):
        causal_conv1d(inputs["x"], torch.zeros(3, 4), None, layout.offsets, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match="layout must describe offsets"):
        causal_conv1d(**inputs, offsets=layout.offsets, layout=JaggedLayout.from_lengths([2]), backend=Backend.REFERENCE)
    with pytest.raises(NotImplementedError, match="Triton"):
        causal_conv1d(**inputs, offsets=layout.offsets, backend=Backend.TRITON)
