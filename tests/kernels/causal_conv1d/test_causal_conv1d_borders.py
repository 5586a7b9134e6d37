"""Where rows meet the borders of programs: inside of a row the kernels walk without masks, elsewhere with them; out of a tensor, never."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, causal_conv1d, rms_norm_causal_conv1d
from gbla_kernels.causal_conv1d import backward, forward
from gbla_kernels.causal_conv1d.autograd import causal_conv1d_triton
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.rms_norm_causal_conv1d import backward as norm_backward
from gbla_kernels.rms_norm_causal_conv1d import forward as norm_forward
from gbla_kernels.rms_norm_causal_conv1d.autograd import rms_norm_causal_conv1d_triton
from gbla_kernels.testing.conv_laws import (
    ConvSubject,
    no_token_reads_across_a_row_start,
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    strided_views_equal_contiguous_inputs,
)

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU long rows are held by test_causal_conv1d_gpu.py")

STRIPS, STRIP = 2, 12
"""Strips of a program, and tokens of each: three steps of the forward."""
TOKENS = STRIPS * STRIP
"""Of a program."""
MAX_PROGRAMS = 4
CONV = ConvSubject(op=causal_conv1d, backend=Backend.TRITON, dtype=torch.float32, dim=20)
NORM_CONV = replace(CONV, op=rms_norm_causal_conv1d, has_norm=True)
both_ops = pytest.mark.parametrize("subject", [CONV, NORM_CONV], ids=["conv", "norm_conv"])


@pytest.fixture
def small_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of ``TOKENS`` tokens in batches of 64 to 95, where those of real ones would fill the batch and none be inside of a row."""
    block_dim = 32
    for module, kernel in ((forward, "FORWARD"), (norm_forward, "FORWARD"), (backward, "BACKWARD"), (norm_backward, "BACKWARD")):
        monkeypatch.setattr(module, f"{kernel}_ELEMENTS", STRIPS * block_dim)
        monkeypatch.setattr(module, f"{kernel}_PROGRAMS", MAX_PROGRAMS)
    for make in (forward.Tile.of_channels, forward.Tile.of_whole_tokens):
        tile = make(CONV.dim, STRIPS * block_dim)
        assert (tile.rows, tile.block_dim) == (STRIPS, block_dim)
        assert {tile.strips(num_tokens, MAX_PROGRAMS)[0] for num_tokens in (64, 95)} == {STRIP}


@both_ops
def test_a_program_inside_of_a_row_reads_one_position(small_programs: None, poisoned_memory: None, subject: ConvSubject) -> None:
    """So the tests below walk both ways: of the second program no other position is right, and only its own results are."""
    tensors, layout = subject.inputs([3 * TOKENS], 0)
    # the backward reads as many tokens after a program as its steps need for the three taps
    last_read = torch.tensor([2 * TOKENS - 1, 2 * TOKENS - 1 + 4])
    one_each = torch.zeros_like(layout.positions).index_copy(0, last_read, layout.positions[last_read])
    op: Callable[..., Tensor] = partial(causal_conv1d_triton, has_silu=True)
    if subject.has_norm:
        op = partial(rms_norm_causal_conv1d_triton, eps=1e-6, has_silu=True)
    x = tensors["x"]
    assert x is not None
    d_y = torch.randn(layout.num_tokens, subject.dim, generator=torch.Generator().manual_seed(0))
    results = []
    for positions in (layout.positions, one_each):
        y = op(**tensors, positions=positions)
        results.append((y.detach(), *torch.autograd.grad(y, x, d_y)))
    for exact, actual in zip(*results, strict=True):
        is_same = (exact == actual).all(1)
        assert is_same[TOKENS : 2 * TOKENS].all()
        assert not is_same[:TOKENS].all() and not is_same[2 * TOKENS :].all()


@both_ops
@pytest.mark.parametrize("num_taps", [1, 2, 4, 5, 6, 8])
def test_inside_of_a_row_equals_fp64(small_programs: None, poisoned_memory: None, num_taps: int, subject: ConvSubject) -> None:
    # fp16: the errors of its roundings hardly vary, those of short sums in fp32 do
    output_and_gradients_equal_fp64(replace(subject, num_taps=num_taps, dtype=torch.float16), [1, 3 * TOKENS - 4, 2, 0, 1], 0)


@both_ops
def test_inside_of_a_row_views_are_read_in_place(small_programs: None, poisoned_memory: None, subject: ConvSubject) -> None:
    strided_views_equal_contiguous_inputs(subject, [1, 3 * TOKENS - 4, 2], 0)


@both_ops
@given(
    before=st.integers(-2, 9),
    after=st.integers(0, 9),
    rest=st.lists(st.integers(0, 3), max_size=2),
    num_taps=st.integers(1, 8),
)
# just inside of the row and just not, at either end, with steps of four tokens and of two
@example(before=3, after=4, rest=[1], num_taps=4)
@example(before=2, after=4, rest=[3], num_taps=4)
@example(before=5, after=3, rest=[2], num_taps=5)
@example(before=7, after=8, rest=[], num_taps=8)
@settings(max_examples=1, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_may_start_and_end_near_the_borders_of_a_program(
    small_programs: None, poisoned_memory: None, subject: ConvSubject, before: int, after: int, rest: list[int], num_taps: int
) -> None:
    # the third row starts ``before`` tokens before the second program and ends ``after`` tokens after it; its neighbours are undefined
    lengths = [0, TOKENS - before, before + TOKENS + after, *rest, 16]
    for law in (no_token_reads_across_a_row_start, packed_batch_is_each_row_alone_bit_for_bit):
        law(replace(subject, num_taps=num_taps), lengths, 0)


GUARDED = """
import ctypes
import itertools
import mmap

import torch

from gbla_kernels import JaggedLayout
from gbla_kernels.causal_conv1d.backward import launch_backward
from gbla_kernels.causal_conv1d.forward import Tile, launch_forward
from gbla_kernels.dispatch import launch

PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
mappings = []
full = torch.full


def guarded(tensor):
    "The same values against a page that cannot be touched: before the first one, or after the last one."
    size = tensor.numel() * tensor.element_size()
    num_bytes = -(-size // PAGE) * PAGE
    mapping = mmap.mmap(-1, num_bytes + 2 * PAGE)
    mappings.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    offset = PAGE + (num_bytes - size if is_at_end else 0)
    copy = torch.frombuffer(mapping, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor)
    for page in (start, start + PAGE + num_bytes):
        assert libc.mprotect(page, PAGE, 0) == 0, ctypes.get_errno()
    return copy


torch.empty = lambda shape, **options: guarded(full(shape, torch.nan, **options))
# programs of 32 tokens: in the first two batches the third is inside of a row, and the last token the last one it reads: forward, backward
batches = ([34, 2, 60], [34, 2, 64], [1])
for is_at_end, has_norm, lengths in itertools.product((True, False), (True, False), batches):
    layout, dim, num_taps = JaggedLayout.from_lengths(lengths), 20, 4
    tokens = layout.num_tokens
    x, dy, weight, bias = (guarded(torch.randn(shape)) for shape in ((tokens, dim), (tokens, dim), (dim, num_taps), (dim,)))
    norm_weight, rstd = (guarded(torch.randn(dim)), guarded(torch.zeros(tokens))) if has_norm else (None, None)
    positions = guarded(layout.positions)
    tile = Tile(rows=2, block_dim=32, num_blocks=1)
    y = launch_forward(x, norm_weight, weight, bias, positions, rstd, 1e-6, True, tile, 4, launch)
    gradients = launch_backward(dy, x, norm_weight, weight, bias, positions, rstd, True, tile, 4, launch)
    assert all(tensor.isfinite().all() for tensor in (y, *gradients)), (is_at_end, has_norm, lengths)
print("nothing else was touched")
"""


def test_nothing_around_a_tensor_is_touched() -> None:
    """Also by loads that come before it is known what is needed; in a process of its own, which a wrong address ends."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run([sys.executable, "-c", GUARDED], env=environment, capture_output=True, text=True, timeout=150)
    assert finished.stdout == "nothing else was touched\n", (finished.returncode, finished.stderr)
