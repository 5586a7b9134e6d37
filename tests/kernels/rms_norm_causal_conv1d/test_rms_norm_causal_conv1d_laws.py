"""The laws of the causal convolution of the RMSNorm, on the reference and on Triton in the interpreter: output and every gradient."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, causal_conv1d, rms_norm_causal_conv1d
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.rms_norm_causal_conv1d.autograd import rms_norm_causal_conv1d_backward_op, rms_norm_causal_conv1d_op
from gbla_kernels.testing.conv_laws import LAWS, ConvSubject, Law
from gbla_kernels.testing.error_budget import outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import JaggedLengths

REFERENCE = ConvSubject(op=rms_norm_causal_conv1d, has_norm=True, backend=Backend.REFERENCE, dtype=torch.float64, dim=3)
TRITON = ConvSubject(op=rms_norm_causal_conv1d, has_norm=True, backend=Backend.TRITON, dtype=torch.float32, dim=20)

# one channel would make the norm a sign, with the gradient zero
variants = st.fixed_dictionaries(
    {
        "num_taps": st.integers(1, 8),
        "activation": st.sampled_from(["silu", None]),
        "has_bias": st.booleans(),
        "dim": st.sampled_from([3, 20, 70]),
    }
)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the laws are held by test_causal_conv1d_gpu.py")
all_laws = pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)


@given(lengths=st.from_type(JaggedLengths), variant=variants, eps=st.sampled_from([1e-6, 0.1]))
@settings(max_examples=6)
def test_reference_equals_torch_norm_then_convolution(lengths: list[int], variant: dict[str, object], eps: float) -> None:
    subject = replace(REFERENCE, **variant)
    tensors, layout = subject.inputs(lengths, seed=0)
    convolve = replace(subject, op=causal_conv1d).call(layout)

    def norm_then_convolve(x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(x=torch.nn.functional.rms_norm(x, (subject.dim,), norm_weight, eps), weight=weight, bias=bias)

    actual = outputs_and_gradients(subject.call(layout, eps=eps), tensors)
    expected = outputs_and_gradients(norm_then_convolve, tensors)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-11, name


@all_laws
@given(lengths=st.from_type(JaggedLengths), variant=variants)
@settings(max_examples=3)
def test_reference_obeys(law: Law, lengths: list[int], variant: dict[str, object]) -> None:
    law(replace(REFERENCE, **variant), lengths, 0)


@interpreted
@all_laws
@given(lengths=st.lists(st.sampled_from([0, 1, 2, 3, 5, 13, 40]), min_size=1, max_size=4), variant=variants)
@example(lengths=[0, 1, 67, 0, 2], variant={})
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_triton_obeys(poisoned_memory: None, law: Law, lengths: list[int], variant: dict[str, object]) -> None:
    law(replace(TRITON, **variant), lengths, 0)


@interpreted
def test_registered_ops_pass_opcheck() -> None:
    tensors, layout = TRITON.inputs([3, 0, 5], 0)
    arguments = (tensors["x"], tensors["norm_weight"], tensors["weight"], tensors["bias"], layout.positions)
    torch.library.opcheck(rms_norm_causal_conv1d_op, (*arguments, 1e-6, True))
    without_graph = tuple(x.detach() if isinstance(x, Tensor) else x for x in arguments)
    torch.library.opcheck(rms_norm_causal_conv1d_backward_op, (torch.ones(8, 20), *without_graph, torch.ones(8), True))


def test_bad_arguments_are_named() -> None:
    tensors, layout = REFERENCE.inputs([3], 0)
    with pytest.raises(ValueError, match=r"norm_weight must have shape \(D,\)"):
        REFERENCE.call(layout)(**{**tensors, "norm_weight": torch.ones(4)})
    with pytest.raises(ValueError, match=r"weight must have shape \(D, R\)"):
        REFERENCE.call(layout)(**{**tensors, "weight": torch.ones(4, 4)})


def test_triton_refuses_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gbla_kernels.dispatch.INTERPRETED", True)
    wide = replace(TRITON, dim=2049)
    tensors, layout = wide.inputs([3], 0)
    with pytest.raises(NotImplementedError, match=r"x may have at most 2048 channels .* got 2049; use nn.RMSNorm, then causal_conv1d"):
        wide.call(layout)(**tensors)
    tensors, layout = REFERENCE.inputs([3], 0)
    call = partial(REFERENCE.call(layout, backend=Backend.TRITON), **tensors)
    with pytest.raises(NotImplementedError, match=r"must be fp32, bf16 or fp16"):
        call()
    monkeypatch.setattr("gbla_kernels.dispatch.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"rms_norm_causal_conv1d: backend=Backend\.TRITON needs CUDA tensors"):
        call()
