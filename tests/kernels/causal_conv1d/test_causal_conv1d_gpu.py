"""The causal convolution on a real GPU: all dtypes and widths, long rows, memory that starts as NaN, graphs and compilers."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from gbla_kernels import Backend, causal_conv1d
from gbla_kernels.causal_conv1d.autograd import causal_conv1d_op
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

BF16 = ConvSubject(op=causal_conv1d, backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", dim=512)
SUBJECTS = {
    "bf16": BF16,
    "bf16_fp32_parameters": replace(BF16, parameter_dtype=torch.float32),
    "fp16": replace(BF16, dtype=torch.float16),
    "fp32": replace(BF16, dtype=torch.float32),
    "bare": replace(BF16, has_bias=False, activation=None),
}
LENGTHS = [*NASTY_LENGTHS, 0, 1500, 5]
poisoned = pytest.mark.usefixtures("poisoned_memory")
layout_or_offsets = pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])


@poisoned
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_triton_obeys(law: Law, subject: ConvSubject) -> None:
    law(subject, LENGTHS, 1)


@poisoned
@pytest.mark.parametrize("num_taps", [1, 2, 3, 8])
def test_any_number_of_taps(num_taps: int) -> None:
    for law in (output_and_gradients_equal_fp64, packed_batch_is_each_row_alone_bit_for_bit):
        law(replace(BF16, num_taps=num_taps, dim=64), LENGTHS, 2)


@poisoned
@pytest.mark.parametrize("dim", [1, 48, 77, 768, 1000])
def test_any_width(dim: int) -> None:
    for law in (output_and_gradients_equal_fp64, packed_batch_is_each_row_alone_bit_for_bit):
        law(replace(BF16, dim=dim), LENGTHS, 3)


@pytest.mark.parametrize("lengths", [[1, 0, 131_072, 2, 513], [2048] * 32, [9] * 4096], ids=["giant", "packed", "tiny"])
def test_long_batches_equal_fp64(lengths: list[int]) -> None:
    output_and_gradients_equal_fp64(replace(BF16, dim=256, parameter_dtype=torch.float32), lengths, 4)


def test_long_rows_pack_bit_for_bit() -> None:
    packed_batch_is_each_row_alone_bit_for_bit(BF16, [3, 131_072, 0, 20_000, 512], 5)


def test_offsets_past_2_to_the_31_elements() -> None:
    tokens_past_2_to_the_31_elements_are_reached(BF16)


@layout_or_offsets
@pytest.mark.parametrize("law", [calls_do_not_synchronise, cuda_graph_replays, compiled_equals_eager], ids=lambda law: law.__name__)
def test_calls_obey(law: Callable[[ConvSubject, bool], None], has_layout: bool) -> None:
    law(SUBJECTS["bf16_fp32_parameters"], has_layout)


def test_hundred_jagged_batches_compile_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    batches_compile_nothing_new(replace(BF16, dim=320, num_taps=3), monkeypatch)


@pytest.mark.parametrize("has_bias", [True, False])
def test_registered_op_passes_opcheck(has_bias: bool) -> None:
    tensors, layout = replace(BF16, has_bias=has_bias, dim=64).inputs([3, 0, 50], 0)
    arguments = (tensors["x"], tensors["weight"], tensors["bias"], layout.positions, True)
    torch.library.opcheck(causal_conv1d_op, arguments)


def test_autocast_changes_nothing() -> None:
    tensors, layout = BF16.inputs(LENGTHS, 6)
    expected = BF16.call(layout)(**tensors)
    with torch.autocast("cuda", dtype=torch.float16):
        assert torch.equal(BF16.call(layout)(**tensors), expected)
