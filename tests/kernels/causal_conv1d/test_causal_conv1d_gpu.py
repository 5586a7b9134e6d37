"""The causal convolutions on a real GPU: all dtypes and widths, long rows, memory that starts as NaN, graphs and compilers."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from gbla_kernels import Backend, causal_conv1d, rms_norm_causal_conv1d
from gbla_kernels.causal_conv1d.autograd import causal_conv1d_backward_op, causal_conv1d_op
from gbla_kernels.rms_norm_causal_conv1d.autograd import rms_norm_causal_conv1d_backward_op, rms_norm_causal_conv1d_op
from gbla_kernels.testing.conv_gpu_laws import (
    batches_compile_nothing_new,
    calls_do_not_synchronise,
    compiled_equals_eager,
    cuda_graph_replays,
    tokens_past_2_to_the_31_elements_are_reached,
)
from gbla_kernels.testing.conv_laws import (
    LAWS,
    ConvSubject,
    Law,
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
)
from gbla_kernels.testing.inputs import NASTY_LENGTHS

pytestmark = pytest.mark.gpu

CONV = ConvSubject(op=causal_conv1d, backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", dim=512)
NORM_CONV = replace(CONV, op=rms_norm_causal_conv1d, has_norm=True)
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16_fp32_parameters": {"parameter_dtype": torch.float32},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32},
    "bare": {"has_bias": False, "activation": None},
}
WIDTHS = [*((CONV, dim) for dim in (1, 48, 77, 768, 1000)), *((NORM_CONV, dim) for dim in (3, 77, 768, 1024, 2048))]
LENGTHS = [*NASTY_LENGTHS, 0, 1500, 5]
poisoned = pytest.mark.usefixtures("poisoned_memory")
both_ops = pytest.mark.parametrize("subject", [CONV, NORM_CONV], ids=["conv", "norm_conv"])
layout_or_offsets = pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])


@poisoned
@both_ops
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_triton_obeys(law: Law, variant: dict[str, Any], subject: ConvSubject) -> None:
    law(replace(subject, **variant), LENGTHS, 1)


@poisoned
@both_ops
@pytest.mark.parametrize("num_taps", [1, 2, 3, 8])
def test_any_number_of_taps(num_taps: int, subject: ConvSubject) -> None:
    for law in (output_and_gradients_equal_fp64, packed_batch_is_each_row_alone_bit_for_bit):
        law(replace(subject, num_taps=num_taps, dim=64), LENGTHS, 2)


@poisoned
@pytest.mark.parametrize(("subject", "dim"), WIDTHS, ids=[f"{subject.op.__name__}-{dim}" for subject, dim in WIDTHS])
def test_any_width(subject: ConvSubject, dim: int) -> None:
    for law in (output_and_gradients_equal_fp64, packed_batch_is_each_row_alone_bit_for_bit):
        law(replace(subject, dim=dim), LENGTHS, 3)


@both_ops
@pytest.mark.parametrize("lengths", [[1, 0, 131_072, 2, 513], [2048] * 32, [9] * 4096], ids=["giant", "packed", "tiny"])
def test_long_batches_equal_fp64(lengths: list[int], subject: ConvSubject) -> None:
    output_and_gradients_equal_fp64(replace(subject, dim=256, parameter_dtype=torch.float32), lengths, 4)


@both_ops
def test_long_rows_pack_bit_for_bit(subject: ConvSubject) -> None:
    packed_batch_is_each_row_alone_bit_for_bit(subject, [3, 131_072, 0, 20_000, 512], 5)


@both_ops
def test_offsets_past_2_to_the_31_elements(subject: ConvSubject) -> None:
    tokens_past_2_to_the_31_elements_are_reached(subject)


@both_ops
@layout_or_offsets
@pytest.mark.parametrize("law", [calls_do_not_synchronise, cuda_graph_replays, compiled_equals_eager], ids=lambda law: law.__name__)
def test_calls_obey(law: Callable[[ConvSubject, bool], None], has_layout: bool, subject: ConvSubject) -> None:
    law(replace(subject, parameter_dtype=torch.float32), has_layout)


@both_ops
def test_hundred_jagged_batches_compile_nothing_new(subject: ConvSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    batches_compile_nothing_new(replace(subject, dim=320, num_taps=3), monkeypatch)


@both_ops
@pytest.mark.parametrize("has_bias", [True, False])
def test_registered_ops_pass_opcheck(has_bias: bool, subject: ConvSubject) -> None:
    tensors, layout = replace(subject, has_bias=has_bias, dim=64).inputs([3, 0, 50], 0)
    arguments = (tensors["weight"], tensors["bias"], layout.positions)
    d_y = torch.randn_like(tensors["x"])
    backward_op: Any
    inputs: tuple[Any, ...]
    if subject.has_norm:
        normed = (tensors["x"], tensors["norm_weight"], *arguments)
        torch.library.opcheck(rms_norm_causal_conv1d_op, (*normed, 1e-6, True))
        _, rstd = rms_norm_causal_conv1d_op(*normed, 1e-6, True)
        backward_op, inputs = rms_norm_causal_conv1d_backward_op, (d_y, *normed, rstd, True)
    else:
        torch.library.opcheck(causal_conv1d_op, (tensors["x"], *arguments, True))
        backward_op, inputs = causal_conv1d_backward_op, (d_y, tensors["x"], *arguments, True)
    # none of it is differentiated again
    torch.library.opcheck(backward_op, tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in inputs))


@both_ops
def test_autocast_changes_nothing(subject: ConvSubject) -> None:
    tensors, layout = subject.inputs(LENGTHS, 6)
    expected = subject.call(layout)(**tensors)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(subject.call(layout)(**tensors), expected)
