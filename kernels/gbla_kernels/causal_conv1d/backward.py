"""The backward kernels: one walk down each strip for all gradients, then the sum of the strips' parameter gradients."""

# mypy: disable-error-code="no-untyped-def,no-untyped-call,untyped-decorator,assignment,var-annotated"
# ruff: noqa: RUF005 (Triton knows no `(*a, b)`)

# B rows, L tokens, D model width, R conv taps, P partial sums

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.causal_conv1d.forward import UNROLL, Tile, load_before, load_parameters, load_positions, load_rows, within_row
from gbla_kernels.dispatch import Launcher
from gbla_kernels.elementwise import sigmoid

BACKWARD_ELEMENTS = 512
"""Elements of a tile: half of the forward's, since a thread also holds the taps' gradients and the unfinished ``dx``."""
BACKWARD_PROGRAMS = 384
"""Programs of four warps that an H100 or H200 holds at once, from the registers of the kernel; also bounds the partial sums."""
BLOCK_PARTIALS = 256
BLOCK_CHANNELS = 8


@triton.jit
def _store_dx(p_dx, b_dx, normed, p_rstd, m_tokens, m_channels, D: tl.constexpr, HAS_NORM: tl.constexpr):
    """Store the finished gradient of a tile; through the norm, ``dx = rstd (dn - n mean(dn n))`` with ``n = x rstd``."""
    if HAS_NORM:
        b_rstd = tl.load(p_rstd, mask=m_tokens, other=0)
        mean = tl.sum(b_dx * normed, 1) / D
        b_dx = b_rstd[:, None] * (b_dx - normed * mean[:, None])
    tl.store(p_dx, b_dx.to(p_dx.dtype.element_ty), mask=m_tokens[:, None] & m_channels)


@triton.jit
def _load_rstds(p_rstd, tokens, num_left, FIRST: tl.constexpr, COUNT: tl.constexpr, HAS_NORM: tl.constexpr):
    """Vectors ``(ROWS,)``, of the ``COUNT`` tokens from ``FIRST`` after ``tokens (ROWS,)`` on; without a norm, none.

    ``tokens`` is read only where ``FIRST`` is negative.
    """
    rstds = ()
    for i in tl.static_range(FIRST, FIRST + COUNT if HAS_NORM else FIRST):
        mask = num_left > i
        if i < 0:
            mask = mask & (tokens >= -i)
        rstds = rstds + (tl.load(p_rstd + i, mask=mask, other=0),)
    return rstds


@triton.jit
def _normed(rows, rstds, COUNT: tl.constexpr, HAS_NORM: tl.constexpr):
    """``COUNT`` tiles of x as the convolution reads them: fp32, and times ``rstds`` where there is a norm."""
    normed = ()
    for i in tl.static_range(COUNT):
        row = rows[i].to(tl.float32)
        if HAS_NORM:
            row = row * rstds[i][:, None]
        normed = normed + (row,)
    return normed


@triton.jit
def _walk_strips(
    dy, x, rstd, positions, dx, before, rows, d_rows, rstds, taps, bias, channels, starts, num_tokens, strip, stride_dy, stride_x,
    D: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    AFTER: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SILU: tl.constexpr, IS_INSIDE: tl.constexpr,
):  # fmt: skip
    """Store dx of the strips; return the sums over their tokens of the tap gradients and of the bias gradient.

    ``before``: inputs of the convolution, of the ``R - 1`` tokens before the strips; ``rows``, ``d_rows``, ``rstds``: x, dy and rstd of the
    ``UNROLL`` tokens from their first on.
    """
    m_channels = (channels < D)[None, :]
    p_x = x + starts[:, None] * stride_x + channels[None, :]
    p_dy = dy + starts[:, None] * stride_dy + channels[None, :]
    p_dx = dx + (starts[:, None] - (R - 1)) * D + channels[None, :]
    p_positions = positions + starts
    p_rstd = rstd + starts
    # 32 bits where nothing is addressed, as in the forward
    num_left = tl.minimum(num_tokens - starts, 2**30).to(tl.int32)
    history, pending, d_taps = before, (), ()
    for _ in tl.static_range(R - 1):
        pending = pending + (tl.zeros((ROWS, BLOCK_D), tl.float32),)
    for _ in tl.static_range(R):
        d_taps = d_taps + (tl.zeros((ROWS, BLOCK_D), tl.float32),)
    d_bias = tl.zeros((ROWS, BLOCK_D), tl.float32)
    # the tokens after the strip read its last ones
    for step in range(0, strip + AFTER, UNROLL):
        conv_inputs = history + _normed(rows, rstds, UNROLL, HAS_NORM)
        row_positions = load_positions(p_positions, num_left, UNROLL, IS_INSIDE)
        for i in tl.static_range(UNROLL):
            position = row_positions[i]
            inputs = ()
            sums = bias
            for distance in tl.static_range(R):
                inputs = inputs + (within_row(conv_inputs[R - 1 + i - distance], position, distance, IS_INSIDE),)
                sums = tl.fma(inputs[distance], taps[distance], sums)
            gradient = d_rows[i].to(tl.float32)
            if HAS_SILU:
                b_sigmoid = sigmoid(sums)
                gradient *= tl.fma(sums * b_sigmoid, 1 - b_sigmoid, b_sigmoid)
            b_dx = (gradient * taps[0],)
            for distance in tl.static_range(1, R):
                near = within_row(gradient, position, distance, IS_INSIDE)
                b_dx = b_dx + (tl.fma(near, taps[distance], pending[distance - 1]),)
            pending = b_dx[: R - 1]
            # no later token reads the one R - 1 back
            finished = step + i - (R - 1)
            m_finished = (finished >= 0) & (finished < strip) & (num_left > i - (R - 1))
            _store_dx(p_dx + i * D, b_dx[R - 1], conv_inputs[i], p_rstd + (i - (R - 1)), m_finished, m_channels, D, HAS_NORM)
            # tokens after the strip count in the next one
            gradient = tl.where(step < strip, gradient, 0)
            d_bias += gradient
            updated = ()
            for distance in tl.static_range(R):
                updated = updated + (tl.fma(gradient, inputs[distance], d_taps[distance]),)
            d_taps = updated
        history = conv_inputs[UNROLL:]
        p_x += UNROLL * stride_x
        p_dy += UNROLL * stride_dy
        p_dx += UNROLL * D
        p_positions += UNROLL
        p_rstd += UNROLL
        num_left -= UNROLL
        m_next = m_channels & (step + UNROLL < strip + AFTER)
        rows = load_rows(p_x, num_left, stride_x, m_next, UNROLL, IS_INSIDE)
        d_rows = load_rows(p_dy, num_left, stride_dy, m_next, UNROLL, IS_INSIDE)
        rstds = _load_rstds(p_rstd, None, num_left, 0, UNROLL, HAS_NORM)
    return d_taps, d_bias


@triton.jit
def _store_partials(partials, d_taps, d_bias, channels, D: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr):
    o_partials = partials + tl.program_id(1).to(tl.int64) * ((R + HAS_BIAS) * D) + channels
    for distance in tl.static_range(R):
        tl.store(o_partials + distance * D, tl.sum(d_taps[distance], 0), mask=channels < D)
    if HAS_BIAS:
        tl.store(o_partials + R * D, tl.sum(d_bias, 0), mask=channels < D)


@triton.jit(do_not_specialize=["num_tokens", "strip"])
def causal_conv1d_backward_kernel(
    dy, x, weight, bias, norm_weight, rstd, positions, dx, partials, num_tokens, strip, stride_dy, stride_x,
    D: tl.constexpr, R: tl.constexpr, PADDED_R: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, UNROLL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SILU: tl.constexpr,
):  # fmt: skip
    """One program: ``ROWS`` adjacent strips of ``BLOCK_D`` channels; one partial sum ``(R + HAS_BIAS, BLOCK_D)``."""
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    # int64: a token times a stride passes 2^31
    first = tl.program_id(1).to(tl.int64) * ROWS * strip
    starts = first + tl.arange(0, ROWS).to(tl.int64) * strip
    # every load before the first use of one; as in the forward, with the tokens that are read after the strips
    AFTER: tl.constexpr = (R - 1 + UNROLL - 1) // UNROLL * UNROLL
    last = first + ROWS * strip + AFTER - 1
    last_position = tl.load(positions + last, mask=last < num_tokens, other=0)
    m_channels = (channels < D)[None, :]
    p_x = x + starts[:, None] * stride_x + channels[None, :]
    p_dy = dy + starts[:, None] * stride_dy + channels[None, :]
    num_left = num_tokens - starts
    x_before = load_before(p_x, starts, num_tokens, stride_x, m_channels, R - 1)
    rstds_before = _load_rstds(rstd + starts, starts, num_left, 1 - R, R - 1, HAS_NORM)
    rows = load_rows(p_x, num_left, stride_x, m_channels, UNROLL, False)
    d_rows = load_rows(p_dy, num_left, stride_dy, m_channels, UNROLL, False)
    rstds = _load_rstds(rstd + starts, None, num_left, 0, UNROLL, HAS_NORM)
    taps, b_bias = load_parameters(weight, bias, norm_weight, channels, D, R, PADDED_R, ROWS, HAS_BIAS, HAS_NORM)
    before = _normed(x_before, rstds_before, R - 1, HAS_NORM)
    is_inside = last_position >= ROWS * strip + AFTER + R - 2
    if is_inside:
        d_taps, d_bias = _walk_strips(
            dy, x, rstd, positions, dx, before, rows, d_rows, rstds, taps, b_bias, channels, starts, num_tokens, strip, stride_dy, stride_x,
            D, R, ROWS, BLOCK_D, UNROLL, AFTER, HAS_NORM, HAS_SILU, True,
        )  # fmt: skip
        _store_partials(partials, d_taps, d_bias, channels, D, R, HAS_BIAS)
    else:
        d_taps, d_bias = _walk_strips(
            dy, x, rstd, positions, dx, before, rows, d_rows, rstds, taps, b_bias, channels, starts, num_tokens, strip, stride_dy, stride_x,
            D, R, ROWS, BLOCK_D, UNROLL, AFTER, HAS_NORM, HAS_SILU, False,
        )  # fmt: skip
        _store_partials(partials, d_taps, d_bias, channels, D, R, HAS_BIAS)


@triton.jit(do_not_specialize=["num_partials"])
def causal_conv1d_parameters_kernel(
    partials, weight, norm_weight, d_weight, d_bias, d_norm_weight, num_partials,
    D: tl.constexpr, R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """Sum ``partials (P, R + HAS_BIAS, D)`` in a fixed order; with the norm, they are gradients of ``weight * norm_weight``."""
    channels = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_channels = channels < D
    totals = ()
    for _ in tl.static_range(R + HAS_BIAS):
        totals = totals + (tl.zeros((BLOCK_P, BLOCK_D), tl.float32),)
    for i_first in range(0, num_partials, BLOCK_P):
        o_partial = i_first + tl.arange(0, BLOCK_P)
        mask = (o_partial < num_partials)[:, None] & m_channels[None, :]
        updated = ()
        for i in tl.static_range(R + HAS_BIAS):
            o_sums = (o_partial * (R + HAS_BIAS) + i)[:, None] * D + channels[None, :]
            updated = updated + (totals[i] + tl.load(partials + o_sums, mask=mask, other=0),)
        totals = updated
    b_d_norm = tl.zeros((BLOCK_D,), tl.float32)
    for distance in tl.static_range(R):
        o_weight = channels * R + (R - 1 - distance)
        total = tl.sum(totals[distance], 0)
        if HAS_NORM:
            b_d_norm += total * tl.load(weight + o_weight, mask=m_channels, other=0).to(tl.float32)
            total = total * tl.load(norm_weight + channels, mask=m_channels, other=0).to(tl.float32)
        tl.store(d_weight + o_weight, total.to(d_weight.dtype.element_ty), mask=m_channels)
    if HAS_BIAS:
        tl.store(d_bias + channels, tl.sum(totals[R], 0).to(d_bias.dtype.element_ty), mask=m_channels)
    if HAS_NORM:
        tl.store(d_norm_weight + channels, b_d_norm.to(d_norm_weight.dtype.element_ty), mask=m_channels)


def causal_conv1d_backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, has_silu: bool, launcher: Launcher
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, each in its dtype; that of a missing bias is empty."""
    tile = Tile.of_channels(x.shape[1], BACKWARD_ELEMENTS)
    dx, _, d_weight, d_bias = launch_backward(dy, x, None, weight, bias, positions, None, has_silu, tile, BACKWARD_PROGRAMS, launcher)
    return dx, d_weight, d_bias


def launch_backward(
    dy: Tensor,
    x: Tensor,
    norm_weight: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    positions: Tensor,
    rstd: Tensor | None,
    has_silu: bool,
    tile: Tile,
    max_programs: int,
    launcher: Launcher,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, norm_weight, weight and bias, each in its dtype; those of missing ones are empty."""
    num_tokens, dim, num_taps = x.shape[0], int(x.shape[1]), int(weight.shape[1])
    has_bias, has_norm = bias is not None, norm_weight is not None
    strip, grid = tile.strips(num_tokens, max_programs)
    weight = weight.contiguous()
    norm = weight if norm_weight is None else norm_weight.contiguous()
    dx = torch.empty((num_tokens, dim), dtype=x.dtype, device=x.device)
    # (P, R + has_bias, D), but flat: a compiler would treat P = 1 apart
    partials = torch.empty((grid[1] * (num_taps + has_bias) * dim,), dtype=torch.float32, device=x.device)
    d_weight = torch.empty_like(weight)
    d_bias = weight.new_empty(0) if bias is None else torch.empty((dim,), dtype=bias.dtype, device=x.device)
    d_norm = weight.new_empty(0) if norm_weight is None else torch.empty((dim,), dtype=norm_weight.dtype, device=x.device)
    launcher(causal_conv1d_backward_kernel, grid)(
        dy,
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        norm,
        weight if rstd is None else rstd,
        positions,
        dx,
        partials,
        num_tokens,
        strip,
        dy.stride(0),
        x.stride(0),
        D=dim,
        R=num_taps,
        PADDED_R=triton.next_power_of_2(num_taps),
        ROWS=tile.rows,
        BLOCK_D=tile.block_dim,
        # fewer tokens at once where they would not fit the registers
        UNROLL=UNROLL // 2 if has_norm or num_taps > 5 else UNROLL,
        HAS_BIAS=has_bias,
        HAS_NORM=has_norm,
        HAS_SILU=has_silu,
        num_warps=tile.num_warps,
    )
    launcher(causal_conv1d_parameters_kernel, (triton.cdiv(dim, BLOCK_CHANNELS),))(
        partials,
        weight,
        norm,
        d_weight,
        d_bias,
        d_norm,
        grid[1],
        D=dim,
        R=num_taps,
        BLOCK_P=BLOCK_PARTIALS,
        BLOCK_D=BLOCK_CHANNELS,
        HAS_BIAS=has_bias,
        HAS_NORM=has_norm,
        num_warps=8,
    )
    return dx, d_norm, d_weight, d_bias
