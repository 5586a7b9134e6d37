"""The forward kernel: each row of a tile walks down its own strip of tokens and keeps the last ``R - 1`` of them in registers."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment"
# ruff: noqa: RUF005 (Triton knows no `(*a, b)`)

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.dispatch import Launcher
from gbla_kernels.elementwise import sigmoid

MAX_TAPS = 8
"""More would not fit the registers of the backward."""
FORWARD_ELEMENTS = 1024
"""Elements of a tile: eight channels, 16 bytes of bf16, for each thread of four warps."""
UNROLL = 4
"""Tokens of a strip that are loaded together. Strips are multiples of it."""
FORWARD_PROGRAMS = 528
"""Programs of four warps that an H100 or H200 holds at once, from the registers of the kernel; strips grow with ``L`` to stay below."""


@dataclass(frozen=True)
class Tile:
    """A tile of ``rows`` strips by ``block_dim`` channels, ``num_blocks`` of which cover ``D``."""

    rows: int
    block_dim: int
    num_blocks: int
    num_warps: int = 4

    @classmethod
    def of_channels(cls, dim: int, elements: int) -> "Tile":
        """A tile over a part of the channels: blocks that divide ``D`` are preferred, to waste none of it."""
        # a compiler may trace with symbolic widths, but a kernel has fixed ones
        dim = int(dim)
        divisor = min(dim & -dim, 256)
        block_dim = divisor if divisor >= 64 else min(max(triton.next_power_of_2(dim), 16), 256)
        return cls(elements // block_dim, block_dim, triton.cdiv(dim, block_dim))

    @classmethod
    def of_whole_tokens(cls, dim: int, elements: int) -> "Tile":
        """A tile over all channels, for sums over them."""
        dim = int(dim)
        block_dim = max(triton.next_power_of_2(dim), 16)
        return cls(max(elements // block_dim, 1), block_dim, 1, min(max(4 * block_dim // elements, 4), 8))

    def strips(self, num_tokens: int, max_programs: int) -> tuple[int, tuple[int, int]]:
        """Tokens of a strip and the grid: about ``max_programs`` programs at most, and one at least.

        Integer arithmetic only: ``num_tokens`` may be symbolic.
        """
        strip = UNROLL * (1 + num_tokens * self.num_blocks // (UNROLL * self.rows * max_programs))
        return strip, (self.num_blocks, num_tokens // (self.rows * strip) + 1)


@triton.jit
def load_taps(weight, channels, D: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr, ROWS: tl.constexpr):
    """``R`` tiles ``(ROWS, BLOCK_D)`` fp32 with the same weights in each row; the tap of the current token comes first."""
    # one vector load per channel, then the taps apart: loads of single taps would touch each cache line R times
    o_tap = tl.arange(0, PADDED_R)
    m_tap = (channels < D)[:, None] & (o_tap < R)[None, :]
    b_weight = tl.load(weight + channels[:, None] * R + o_tap[None, :], mask=m_tap, other=0).to(tl.float32)
    taps = ()
    for distance in tl.static_range(R):
        tap = tl.sum(tl.where(o_tap[None, :] == R - 1 - distance, b_weight, 0), 1)
        taps = taps + (tl.broadcast_to(tap[None, :], (ROWS, channels.shape[0])),)
    return taps


@triton.jit
def load_channels(values, channels, D: tl.constexpr, ROWS: tl.constexpr):
    """``(ROWS, BLOCK_D)`` fp32 with ``values (D,)`` in each row: loaded as a tile, so that nothing is exchanged between threads."""
    p_values = values + channels[None, :] + tl.zeros((ROWS, 1), tl.int32)
    return tl.load(p_values, mask=(channels < D)[None, :], other=0).to(tl.float32)


@triton.jit
def load_parameters(
    weight, bias, norm_weight, channels,
    D: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr, ROWS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """``R`` taps as of ``load_taps``, times the weight of a norm, and the bias: all loaded before the first product."""
    b_bias = load_channels(bias, channels, D, ROWS) if HAS_BIAS else tl.zeros((ROWS, channels.shape[0]), tl.float32)
    if HAS_NORM:
        b_norm = load_channels(norm_weight, channels, D, ROWS)
    taps = load_taps(weight, channels, D, R, PADDED_R, ROWS)
    if HAS_NORM:
        scaled = ()
        for distance in tl.static_range(R):
            scaled = scaled + (taps[distance] * b_norm,)
        taps = scaled
    return taps, b_bias


@triton.jit
def load_before(p_rows, tokens, num_tokens, stride, m_channels, COUNT: tl.constexpr):
    """``COUNT`` tiles ``(ROWS, BLOCK_D)``: those before ``tokens (ROWS,)``, which are at the pointers ``p_rows``; zeros where none are."""
    rows = ()
    for i in tl.static_range(-COUNT, 0):
        mask = m_channels & ((tokens >= -i) & (tokens < num_tokens - i))[:, None]
        rows = rows + (tl.load(p_rows + i * stride, mask=mask, other=0),)
    return rows


@triton.jit
def load_rows(p_rows, num_left, stride, m_channels, COUNT: tl.constexpr, IS_INSIDE: tl.constexpr):
    """``COUNT`` tiles ``(ROWS, BLOCK_D)``, from the pointers ``p_rows`` on; zeros past the ``num_left (ROWS,)`` tokens of the batch."""
    rows = ()
    for i in tl.static_range(COUNT):
        mask = m_channels
        if not IS_INSIDE:
            mask = mask & (num_left > i)[:, None]
        rows = rows + (tl.load(p_rows + i * stride, mask=mask, other=0),)
    return rows


@triton.jit
def load_positions(p_positions, num_left, COUNT: tl.constexpr, IS_INSIDE: tl.constexpr):
    """``COUNT`` vectors ``(ROWS,)``: positions of these tokens in their rows, 0 past the end.

    Inside of a row none is loaded: what stands for them is not looked at.
    """
    positions = ()
    for i in tl.static_range(COUNT):
        if IS_INSIDE:
            positions = positions + (num_left,)
        else:
            positions = positions + (tl.load(p_positions + i, mask=num_left > i, other=0).to(tl.int32),)
    return positions


@triton.jit
def within_row(value, position, distance: tl.constexpr, IS_INSIDE: tl.constexpr):
    """``value``, or zero where the token ``distance`` before the current one belongs to another row."""
    if distance == 0 or IS_INSIDE:
        return value
    else:
        return tl.where(position[:, None] >= distance, value, 0)


@triton.jit
def reciprocal_rms(x, eps, D: tl.constexpr):
    """``1 / sqrt(mean(x^2) + eps)`` over the channels of each row of the tile."""
    # a compiled graph passes Python floats as fp64
    return tl.rsqrt(tl.sum(x * x, 1) / D + tl.cast(eps, tl.float32))


@triton.jit
def _walk_strips(
    x, positions, y, rstd, before, rows, taps, bias, channels, starts, num_tokens, strip, stride_x, eps,
    D: tl.constexpr, R: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SILU: tl.constexpr, UNROLL: tl.constexpr, IS_INSIDE: tl.constexpr,
):  # fmt: skip
    """Store y of the strips; ``before`` and ``rows`` are the ``R - 1`` tokens before the first one, and the ``UNROLL`` from there on."""
    m_channels = (channels < D)[None, :]
    p_x = x + starts[:, None] * stride_x + channels[None, :]
    p_y = y + starts[:, None] * D + channels[None, :]
    p_positions = positions + starts
    p_rstd = rstd + starts
    # 32 bits where nothing is addressed: registers decide how many programs fit
    num_left = tl.minimum(num_tokens - starts, 2**30).to(tl.int32)
    history = ()
    for i in tl.static_range(R - 1):
        row = before[i].to(tl.float32)
        if HAS_NORM:
            row = row * reciprocal_rms(row, eps, D)[:, None]
        history = history + (row,)
    for step in range(0, strip, UNROLL):
        inputs = history
        for i in tl.static_range(UNROLL):
            row = rows[i].to(tl.float32)
            if HAS_NORM:
                b_rstd = reciprocal_rms(row, eps, D)
                tl.store(p_rstd + i, b_rstd, mask=num_left > i)
                row = row * b_rstd[:, None]
            inputs = inputs + (row,)
        row_positions = load_positions(p_positions, num_left, UNROLL, IS_INSIDE)
        p_x += UNROLL * stride_x
        m_next = m_channels & (step + UNROLL < strip)
        if HAS_NORM:
            # hidden behind these tokens; without the norm the registers it takes would cost a program
            rows = load_rows(p_x, num_left - UNROLL, stride_x, m_next, UNROLL, IS_INSIDE)
        for i in tl.static_range(UNROLL):
            mask = m_channels
            if not IS_INSIDE:
                mask = mask & (num_left > i)[:, None]
            sums = bias
            for distance in tl.static_range(R):
                sums = tl.fma(within_row(inputs[R - 1 + i - distance], row_positions[i], distance, IS_INSIDE), taps[distance], sums)
            if HAS_SILU:
                sums = sums * sigmoid(sums)
            tl.store(p_y + i * D, sums.to(y.dtype.element_ty), mask=mask)
        if not HAS_NORM:
            rows = load_rows(p_x, num_left - UNROLL, stride_x, m_next, UNROLL, IS_INSIDE)
        history = inputs[UNROLL:]
        p_y += UNROLL * D
        p_positions += UNROLL
        p_rstd += UNROLL
        num_left -= UNROLL


@triton.jit(do_not_specialize=["num_tokens", "strip"])
def causal_conv1d_forward_kernel(
    x, weight, bias, norm_weight, positions, y, rstd, num_tokens, strip, stride_x, eps,
    D: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` adjacent strips of ``BLOCK_D`` channels."""
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    # int64: a token times a stride passes 2^31
    first = tl.program_id(1).to(tl.int64) * ROWS * strip
    starts = first + tl.arange(0, ROWS).to(tl.int64) * strip
    # every load before the first use of one: a program of few tokens waits once, not for each in turn
    last = first + ROWS * strip - 1
    last_position = tl.load(positions + last, mask=last < num_tokens, other=0)
    m_channels = (channels < D)[None, :]
    p_x = x + starts[:, None] * stride_x + channels[None, :]
    before = load_before(p_x, starts, num_tokens, stride_x, m_channels, R - 1)
    rows = load_rows(p_x, num_tokens - starts, stride_x, m_channels, UNROLL, False)
    taps, b_bias = load_parameters(weight, bias, norm_weight, channels, D, R, PADDED_R, ROWS, HAS_BIAS, HAS_NORM)
    # far enough into its row, the last token shows that all taps of all tokens are in that row: no masks
    is_inside = last_position >= ROWS * strip + R - 2
    if is_inside:
        _walk_strips(
            x, positions, y, rstd, before, rows, taps, b_bias, channels, starts, num_tokens, strip, stride_x, eps,
            D, R, HAS_NORM, HAS_SILU, UNROLL, True,
        )  # fmt: skip
    else:
        _walk_strips(
            x, positions, y, rstd, before, rows, taps, b_bias, channels, starts, num_tokens, strip, stride_x, eps,
            D, R, HAS_NORM, HAS_SILU, UNROLL, False,
        )  # fmt: skip


def causal_conv1d_forward(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool, launcher: Launcher) -> Tensor:
    """``(L, D)`` in the dtype of ``x (L, D)``; ``positions (L,)`` are those of the tokens in their rows."""
    tile = Tile.of_channels(x.shape[1], FORWARD_ELEMENTS)
    return launch_forward(x, None, weight, bias, positions, None, 0.0, has_silu, tile, FORWARD_PROGRAMS, launcher)


def launch_forward(
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    rstd: Tensor | None,
    eps: float,
    has_silu: bool,
    tile: Tile,
    max_programs: int,
    launcher: Launcher,
) -> Tensor:
    """The convolution of x, or, given ``norm_weight`` and a tile of whole tokens, of its RMSNorm; fills ``rstd (L,)`` then."""
    num_tokens, dim, num_taps = x.shape[0], int(x.shape[1]), int(weight.shape[1])
    strip, grid = tile.strips(num_tokens, max_programs)
    weight = weight.contiguous()
    y = torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device)
    launcher(causal_conv1d_forward_kernel, grid)(
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        weight if norm_weight is None else norm_weight.contiguous(),
        positions,
        y,
        weight if rstd is None else rstd,
        num_tokens,
        strip,
        x.stride(0),
        eps,
        D=dim,
        R=num_taps,
        PADDED_R=triton.next_power_of_2(num_taps),
        ROWS=tile.rows,
        BLOCK_D=tile.block_dim,
        UNROLL=UNROLL,
        HAS_BIAS=bias is not None,
        HAS_NORM=norm_weight is not None,
        HAS_SILU=has_silu,
        num_warps=tile.num_warps,
    )
    return y
