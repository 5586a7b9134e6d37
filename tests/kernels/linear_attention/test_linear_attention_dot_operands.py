"""Vectors as operands of products on the tensor cores. The interpreter's laws run in fp32, where nothing is left after rounding."""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention.elementwise import outer_column, outer_row, two_columns, two_rows

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the laws run in bf16 and hold the products themselves")

BLOCK = 64
LOST = 2**-7
"""The largest share of a value that conversion to bf16 takes away: half as much on a GPU, which rounds where the interpreter cuts off."""


@triton.jit
def operands_kernel(x, y, column, row, columns, rows, BLOCK: tl.constexpr):
    o_block, o_inner = tl.arange(0, BLOCK), tl.arange(0, 16)
    b_x, b_y = tl.load(x + o_block), tl.load(y + o_block)
    p_columns, p_rows = o_block[:, None] * 16 + o_inner[None, :], o_inner[:, None] * BLOCK + o_block[None, :]
    tl.store(column + p_columns, outer_column(b_x, BLOCK, tl.bfloat16))
    tl.store(row + p_rows, outer_row(b_y, BLOCK, tl.bfloat16))
    o_few = tl.arange(0, 8)
    tl.store(columns + o_block[:, None] * 8 + o_few[None, :], two_columns(b_x, BLOCK, tl.bfloat16))
    tl.store(rows + p_rows, two_rows(b_y, BLOCK, tl.bfloat16))


def operands(x: Tensor, y: Tensor) -> list[Tensor]:
    found = [torch.full(shape, torch.nan, dtype=torch.bfloat16) for shape in ((BLOCK, 16), (16, BLOCK), (BLOCK, 8), (16, BLOCK))]
    operands_kernel[(1,)](x, y, *found, BLOCK=BLOCK)
    return [operand.double() for operand in found]


def vectors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, BLOCK, generator=generator).mul_(100.0)
    return x, y


def test_columns_and_rows_add_up_to_a_vector_but_for_the_rounding_of_the_remainder() -> None:
    x, y = vectors()
    _, _, columns, rows = operands(x, y)
    for total, vector in ((columns.sum(dim=1), x.double()), (rows.sum(dim=0), y.double())):
        assert torch.all((total - vector).abs() <= LOST**2 * vector.abs())


def test_an_outer_product_lacks_but_roundings_of_remainders_and_the_product_of_both() -> None:
    x, y = vectors()
    column, row, *_ = operands(x, y)
    exact = x.double()[:, None] * y.double()[None, :]
    # one for each remainder rounded, one for their product
    error = ((column @ row - exact) / exact).abs().max()
    assert error <= 3 * LOST**2
