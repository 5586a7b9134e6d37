"""Softmax attention between jagged batches: equals each row alone, and the fused GPU path equals the exact one."""

import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import JaggedLayout
from gbla_kernels.testing.error_budget import FUSED_ATTENTION_FACTORS, assert_errors_within, relative_error
from gbla_rec.models import jagged_attention as module
from gbla_rec.models.jagged_attention import jagged_attention
from gbla_rec.models.row_attention import row_attention_op

NAMES = ("output", "d_query", "d_key", "d_value")
WEIGHTING = (torch.arange(16, dtype=torch.float64) - 7.5) / 8
"""Of the output, exact in bf16."""
rows_strategy = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 70)), min_size=1, max_size=5)


def inputs_of(rows: list[tuple[int, int]], dtype: torch.dtype) -> tuple[list[Tensor], JaggedLayout, JaggedLayout]:
    generator = torch.Generator().manual_seed(0)
    queries, keys = (JaggedLayout.from_lengths([row[side] for row in rows]) for side in (0, 1))
    shapes = [(layout.num_tokens, 2, 16) for layout in (queries, keys, keys)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes], queries, keys


def outputs(
    tensors: list[Tensor], queries: JaggedLayout, keys: JaggedLayout, is_causal: bool = False, window: int | None = None
) -> list[Tensor]:
    """Output, and the gradients of query, key and value."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = jagged_attention(*leaves, queries, keys, is_causal=is_causal, window=window)
    return [output.detach(), *torch.autograd.grad((output * WEIGHTING.to(output)).sum(), leaves)]


def definition(
    tensors: list[Tensor],
    queries: JaggedLayout,
    keys: JaggedLayout,
    is_causal: bool = False,
    window: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """The same from a dense score matrix with a block mask."""
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in tensors)
    may_see = queries.rows[:, None] == keys.rows[None, :]
    if window is not None:
        may_see = may_see & ((queries.positions[:, None] - keys.positions[None, :]).abs() <= window)
    if is_causal:
        may_see = may_see & (queries.positions[:, None] >= keys.positions[None, :])
    scores = torch.einsum("thk,shk->hts", query, key) / 4
    weights = torch.softmax(scores.masked_fill(~may_see, -torch.inf), dim=-1)
    output = torch.einsum("hts,shk->thk", weights.nan_to_num(0), value)
    total = (output * WEIGHTING.to(dtype)).sum()
    return [output.detach(), *(gradient.nan_to_num(0) for gradient in torch.autograd.grad(total, [query, key, value]))]


@given(rows=rows_strategy)
@example(rows=[(3, 0), (0, 5), (1, 1), (4, 65)])
@example(rows=[(0, 0)])
def test_equals_dense_attention_under_a_block_mask(rows: list[tuple[int, int]]) -> None:
    tensors, queries, keys = inputs_of(rows, torch.float64)
    for actual, expected in zip(outputs(tensors, queries, keys), definition(tensors, queries, keys), strict=True):
        assert relative_error(actual, expected) < 1e-10


@given(lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4))
def test_causal_attention_sees_no_later_token(lengths: list[int]) -> None:
    tensors, queries, keys = inputs_of([(length, length) for length in lengths], torch.float64)
    for actual, expected in zip(outputs(tensors, queries, keys, True), definition(tensors, queries, keys, True), strict=True):
        assert relative_error(actual, expected) < 1e-10


@given(lengths=st.lists(st.integers(0, 150), min_size=1, max_size=3), window=st.integers(0, 80), is_causal=st.booleans())
@example(lengths=[129, 0, 64], window=64, is_causal=False)
@example(lengths=[129], window=0, is_causal=True)
def test_windowed_attention_sees_only_near_tokens(lengths: list[int], window: int, is_causal: bool) -> None:
    tensors, rows, _ = inputs_of([(length, length) for length in lengths], torch.float64)
    actual, expected = (compute(tensors, rows, rows, is_causal, window) for compute in (outputs, definition))
    for found, exact in zip(actual, expected, strict=True):
        assert relative_error(found, exact) < 1e-10


def test_windowed_attention_holds_no_full_score_matrix() -> None:
    layout = JaggedLayout.from_lengths([4096])
    tensors = [torch.zeros(4096, 1, 8, requires_grad=True) for _ in range(3)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: sizes.append(saved.numel()) or saved, lambda saved: saved):
        jagged_attention(*tensors, layout, layout, window=100)
    assert max(sizes) < 4096 * 4096 / 40


def test_windows_and_causal_masks_that_make_no_sense_are_refused() -> None:
    tensors, queries, keys = inputs_of([(2, 3)], torch.float32)
    with pytest.raises(ValueError, match="must be equal where there is a window"):
        jagged_attention(*tensors, queries, keys, window=4)
    with pytest.raises(ValueError, match="must be equal where there is a window or is_causal"):
        jagged_attention(*tensors, queries, keys, is_causal=True)
    with pytest.raises(ValueError, match="window must not be negative, got -1"):
        jagged_attention(*tensors, queries, keys, window=-1)


def test_layouts_of_other_batches_are_refused() -> None:
    tensors, queries, _ = inputs_of([(2, 3)], torch.float32)
    with pytest.raises(ValueError, match="must have the same rows, got 1 and 2"):
        jagged_attention(*tensors, queries, JaggedLayout.from_lengths([2, 1]))


@pytest.mark.parametrize(("capability", "head_dim"), [((7, 5), 64), ((9, 0), 60), ((9, 0), 264)])
def test_half_precision_without_a_kernel_is_refused_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], head_dim: int
) -> None:
    monkeypatch.setattr(module, "_capability", lambda device: capability)
    tensors, rows, _ = inputs_of([(3, 3)], torch.bfloat16)
    wide = [x.new_zeros(3, 2, head_dim) for x in tensors]
    with pytest.raises(NotImplementedError, match=rf"got capability {re.escape(str(capability))} and width {head_dim}; use fp32"):
        module._flash(*wide, rows, rows, False, None)


def assert_within_budget(actual: list[Tensor], tensors: list[Tensor], *settings: Any) -> None:
    """Of fused kernels, by ``definition`` of the same inputs in fp64, and in fp32 rounded once."""
    exact, in_fp32 = (definition(tensors, *settings, dtype=dtype) for dtype in (torch.float64, torch.float32))
    rounded = [x.bfloat16() for x in in_fp32]
    assert_errors_within(*(dict(zip(NAMES, results, strict=True)) for results in (actual, exact, rounded)), FUSED_ATTENTION_FACTORS)


@pytest.mark.parametrize("wrong", NAMES)
def test_the_budget_of_fused_kernels_has_no_room_for_an_error_of_one_unit_in_the_last_place(wrong: str) -> None:
    arguments = inputs_of([(130, 130), (4, 65)], torch.bfloat16)
    rounded = [x.bfloat16() for x in definition(*arguments, dtype=torch.float32)]
    assert_within_budget(rounded, *arguments)
    shift = torch.finfo(torch.bfloat16).eps
    shifted = [(x.float() * (1 + shift)).bfloat16() if name == wrong else x for name, x in zip(NAMES, rounded, strict=True)]
    with pytest.raises(AssertionError, match=f"{wrong}: relative error"):
        assert_within_budget(shifted, *arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (False, 20), (True, 20)])
@pytest.mark.parametrize("rows", [[(5, 5), (0, 0), (1, 1), (130, 130)], [(3, 0), (4, 65), (0, 7), (1, 300)]])
def test_flash_path_equals_the_exact_one(rows: list[tuple[int, int]], is_causal: bool, window: int | None) -> None:
    if (is_causal or window) and any(queries != keys for queries, keys in rows):
        pytest.skip("needs equal layouts")
    tensors, queries, keys = inputs_of(rows, torch.bfloat16)
    on_gpu = [tensor.cuda() for tensor in tensors]
    actual = [x.cpu() for x in outputs(on_gpu, queries.to("cuda"), keys.to("cuda"), is_causal, window)]
    assert_within_budget(actual, tensors, queries, keys, is_causal, window)


@pytest.mark.parametrize(("is_causal", "window"), [(False, None), (True, None), (False, 2)])
def test_registered_op_passes_opcheck(is_causal: bool, window: int | None) -> None:
    tensors, queries, keys = inputs_of([(3, 3), (0, 0), (5, 5)], torch.float32)
    settings = (queries.offsets_cpu, keys.offsets_cpu, is_causal, window)
    torch.library.opcheck(row_attention_op, (*(x.clone().requires_grad_() for x in tensors), *settings))
