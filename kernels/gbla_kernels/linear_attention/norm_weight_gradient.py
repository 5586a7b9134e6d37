"""The gradient of norm_weight from the shares of splits and short rows."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# H heads, V value width (docs/shapes.md)

import triton
import triton.language as tl


@triton.jit
def add_shares(shares, out, num_shares, i_block, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of ``out (H, V)``: the sum of ``shares (num_shares, H, V)``, in an order that depends on their number alone.

    ``WIDTH`` is ``H V``. ``COLUMNS`` are few, so that many rows are loaded at once.
    """
    o_column = i_block * COLUMNS + tl.arange(0, COLUMNS)
    m_column = o_column < WIDTH
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, num_shares, ROWS):
        o_share = first + tl.arange(0, ROWS)
        m_share = (o_share < num_shares)[:, None] & m_column[None, :]
        total += tl.load(shares + o_share[:, None].to(tl.int64) * WIDTH + o_column[None, :], mask=m_share, other=0.0)
    tl.store(out + o_column, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=m_column)
