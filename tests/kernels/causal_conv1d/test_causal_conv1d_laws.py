"""The laws of the causal convolution, on the reference and on Triton in the interpreter: output and every gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, causal_conv1d
from gbla_kernels.causal_conv1d import api
from gbla_kernels.causal_conv1d.autograd import causal_conv1d_backward_op, causal_conv1d_op
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.testing.conv_laws import LAWS, ConvSubject, Law
from gbla_kernels.testing.error_budget import outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import JaggedLengths, conv_inputs

REFERENCE = ConvSubject(op=causal_conv1d, backend=Backend.REFERENCE, dtype=torch.float64, dim=3)
TRITON = ConvSubject(op=causal_conv1d, backend=Backend.TRITON, dtype=torch.float32, dim=20)

variants = st.fixed_dictionaries(
    {
        "num_taps": st.integers(1, 8),
        "activation": st.sampled_from(["silu", None]),
        "has_bias": st.booleans(),
        "dim": st.sampled_from([1, 3, 70]),
    }
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the laws are held by test_causal_conv1d_gpu.py")
all_laws = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


def rows_by_torch_conv(lengths: list[int], activation: str | None, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Each row through ``torch.nn.functional.conv1d`` with zeros before its first token."""
    rows = []
    for row in x.split(lengths):
        padded = F.pad(row.T, (weight.shape[1] - 1, 0))
        y = F.conv1d(padded[None], weight[:, None], bias, groups=x.shape[1])[0].T if len(row) else row
        rows.append(F.silu(y) if activation else y)
    return torch.cat(rows) + 0 * (x.sum() + weight.sum() + (0 if bias is None else bias.sum()))


@given(lengths=st.from_type(JaggedLengths), variant=variants)
@settings(max_examples=10)
def test_reference_equals_torch_conv_of_each_row(lengths: list[int], variant: dict[str, object]) -> None:
    subject = replace(REFERENCE, **variant)
    tensors, layout = subject.inputs(lengths, seed=0)
    actual = outputs_and_gradients(subject.call(layout), tensors)
    expected = outputs_and_gradients(partial(rows_by_torch_conv, lengths, subject.activation), tensors)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-12, name


@all_laws
@given(lengths=st.from_type(JaggedLengths), variant=variants)
@settings(max_examples=4)
def test_reference_obeys(law: Law, lengths: list[int], variant: dict[str, object]) -> None:
    law(replace(REFERENCE, **variant), lengths, 0)


@interpreted
@all_laws
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 13, 40]), min_size=1, max_size=4), variant=variants)
@example(lengths=[0, 1, 67, 0, 2], variant={})
# two blocks of channels, and the second one only in part
@example(lengths=[5, 0, 3], variant={"dim": 300})
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_triton_obeys(poisoned_memory: None, law: Law, lengths: list[int], variant: dict[str, object]) -> None:
    law(replace(TRITON, **variant), lengths, 0)


@interpreted
def test_a_halo_that_is_off_by_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = api.token_positions
    monkeypatch.setattr(api, "token_positions", lambda *arguments: positions(*arguments) + 1)
    for law in LAWS[:3]:
        with pytest.raises(AssertionError):
            law(TRITON, [3, 5, 1, 4], 0)


@interpreted
def test_registered_ops_pass_opcheck() -> None:
    tensors, layout = replace(TRITON, has_bias=False).inputs([3, 0, 5], 0)
    arguments = (tensors["x"], tensors["weight"], tensors["bias"], layout.positions, True)
    torch.library.opcheck(causal_conv1d_op, arguments)
    without_graph = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(causal_conv1d_backward_op, (torch.ones(8, 20), *without_graph))


def test_bad_arguments_are_named() -> None:
    inputs, layout = conv_inputs([3], dim=2, num_taps=4, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"weight must have shape \(D, R\)"):
        causal_conv1d(inputs["x"], torch.zeros(3, 4), None, layout.offsets, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match="bias must be one of"):
        causal_conv1d(inputs["x"], inputs["weight"], torch.zeros(2, dtype=torch.int64), layout.offsets, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match="layout must describe offsets"):
        causal_conv1d(**inputs, offsets=layout.offsets, layout=JaggedLayout.from_lengths([2]), backend=Backend.REFERENCE)


def test_triton_refuses_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, layout = conv_inputs([3], dim=2, num_taps=9, dtype=torch.float64)
    call = partial(causal_conv1d, offsets=layout.offsets, backend=Backend.TRITON)
    monkeypatch.setattr("gbla_kernels.dispatch.INTERPRETED", True)
    with pytest.raises(NotImplementedError, match=r"weight may have at most 8 taps .* got 9; pass backend=Backend.REFERENCE"):
        call(**inputs)
    with pytest.raises(NotImplementedError, match=r"weight must be fp32, bf16 or fp16 .*; cast it"):
        call(**{**inputs, "weight": inputs["weight"][:, :4]})
    monkeypatch.setattr("gbla_kernels.dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        call(**inputs)
