"""Launches the kernels of a call."""

# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from gbla_kernels.dispatch import Launcher, traced_launch
from gbla_kernels.elementwise import dot_type
from gbla_kernels.linear_attention.key_backward import key_backward_kernel
from gbla_kernels.linear_attention.launch_config import KernelConfig, LaunchConfig, is_hopper, launch_config
from gbla_kernels.linear_attention.output import output_kernel
from gbla_kernels.linear_attention.query_backward import query_backward_kernel
from gbla_kernels.linear_attention.short_rows import row_backward_kernel, row_kernel
from gbla_kernels.linear_attention.state import combine_states_kernel, state_kernel
from gbla_kernels.linear_attention.state_gradient import combine_gradients_kernel
from gbla_kernels.linear_attention.tiny_rows import tiny_row_kernel
from gbla_kernels.linear_attention.tiny_rows_backward import tiny_row_backward_kernel
from gbla_kernels.row_splits import TINY_ROW_LIMITS

SHARE_ROWS, SHARE_COLUMNS = 512, 8
"""Block of a program that adds up the shares of the gradient of norm_weight."""


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """Which rows, how their work is shared out, and the switches of the op that kernels are specialised on.

    Attributes:
        class_ends: where the classes of short rows end in ``short_rows``, or None.
        fold: the partial states of a row of at most so many splits are added up by each of their readers, not by a kernel; 0 for none.
            Not heeded where a state is too large for one program: there a kernel adds up all.
        is_folded: whether no row has more splits than ``fold``.
        output_pieces: programs per split of the output kernel, where tokens do not depend on each other.
        key_pieces: the same of the key side of backward.
        for_backward: whether the states are as exact as backward needs them; forward alone does with less.
    """

    short_rows: Tensor
    splits: Tensor
    slot_offsets: Tensor
    has_short: bool
    has_splits: bool
    class_ends: tuple[int, ...] | None
    fold: int
    is_folded: bool
    output_pieces: int
    key_pieces: int
    use_relu: bool
    normalize: bool
    eps: float
    for_backward: bool


@dataclass(frozen=True, slots=True, eq=False)
class Inputs:
    """Token tensors of the op, or their gradients, ``(L, H, ...)``, last dimension dense; gates may be None."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_gate: Tensor | None
    output_gate: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class RowStates:
    """Combined states of rows that have splits: ``(G, H, K, V)``, ``(G, H, K)`` and ``(G, H, 2)`` (largest gate, sum of weights), fp32."""

    state: Tensor
    normalizer: Tensor
    stats: Tensor


def _options(run: Launcher, x: Inputs, kernel: KernelConfig, config: LaunchConfig, *, slices: bool = True) -> dict[str, Any]:
    options: dict[str, Any] = {"K": int(x.query.shape[2]), "V": int(x.value.shape[2])}
    options |= {"BT": kernel.block_tokens, "BK": config.key_block, "BV": config.value_block}
    if slices:
        options["NK"] = config.num_key_blocks
    if kernel.max_registers is not None and run is not traced_launch:
        options["maxnreg"] = kernel.max_registers
    return options | {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}


def _dot_type(dtype: torch.dtype, config: LaunchConfig) -> Any:
    # sliced states: speed is not their aim, and in bf16 their products were seen to give NaN on Hopper (Triton 3.6)
    return tl.float32 if config.num_key_blocks > 1 else dot_type(dtype)


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def run_forward(run: Launcher, x: Inputs, norm_weight: Tensor | None, work: Work) -> tuple[Tensor, RowStates]:
    """Output ``(L, H, V)``, contiguous, and the states of rows that have splits."""
    num_tokens, num_heads = x.query.shape[:2]
    # int: a compiled kernel is made for these widths, whatever else is dynamic
    key_dim, value_dim = int(x.query.shape[2]), int(x.value.shape[2])
    config = launch_config(key_dim, value_dim, x.query.dtype, is_hopper(x.query.device))
    dot = _dot_type(x.query.dtype, config)
    out = x.value.new_empty(num_tokens, num_heads, value_dim)
    num_splits, num_slots = work.splits.shape[0], work.slot_offsets.shape[0] - 1
    states = new_states(x, num_slots)
    gate_flags = {"HAS_GATE": x.key_gate is not None, "RELU": work.use_relu, "DOT": dot}
    output_flags = {
        "HAS_OUTPUT_GATE": x.output_gate is not None,
        "HAS_NORM": norm_weight is not None,
        "NORMALIZE": work.normalize,
        "RELU": work.use_relu,
        "DOT": dot,
    }
    key_gate = x.key if x.key_gate is None else x.key_gate
    output_gate = x.query if x.output_gate is None else x.output_gate
    weight = x.query if norm_weight is None else norm_weight
    key_strides = (*_strides(x.key), *_strides(x.value), *_strides(x.key_gate))
    if work.has_short and config.num_key_blocks == 1:
        for rows, _, longer_than, is_tiny, kernel in _short_rows(work, config.tiny_rows, config.row):
            run(tiny_row_kernel if is_tiny else row_kernel, (rows.shape[0] * num_heads,))(
                *(x.query, x.key, x.value, key_gate, output_gate, weight, out, rows),
                *(*_strides(x.query), *key_strides, *_strides(x.output_gate), *_strides(out)),
                *(num_heads, work.eps),
                LONGER_THAN=longer_than,
                **output_flags | gate_flags,
                **_options(run, x, kernel, config, slices=False),
            )
    if work.has_splits:
        partial = new_states(x, num_splits)
        run(state_kernel, (num_splits * num_heads * config.num_key_blocks,))(
            *(x.key, x.value, key_gate, work.splits, partial.state, partial.normalizer, partial.stats),
            *key_strides,
            num_heads,
            FOR_BACKWARD=work.for_backward,
            **gate_flags,
            **_options(run, x, config.state_for_backward if work.for_backward else config.state, config),
        )
        fold = work.fold if config.num_key_blocks == 1 else 0
        if not (fold and work.is_folded):
            block, num_blocks = _combine_blocks(key_dim, config)
            run(combine_states_kernel, (num_slots * num_heads, num_blocks))(
                *(partial.state, partial.normalizer, partial.stats, work.slot_offsets),
                *(states.state, states.normalizer, states.stats, fold, num_heads),
                K=key_dim,
                V=value_dim,
                BK=block,
                BV=config.value_block,
                num_warps=2,
            )
        run(output_kernel, (num_splits * num_heads * work.output_pieces,))(
            *(x.query, output_gate, weight, out, work.splits, work.slot_offsets),
            *(partial.state, partial.normalizer, partial.stats, states.state, states.normalizer, states.stats, fold),
            work.output_pieces,
            *(*_strides(x.query), *_strides(x.output_gate), *_strides(out), num_heads, work.eps),
            **output_flags,
            **_options(run, x, config.output, config),
        )
    return out, states


def run_backward(
    run: Launcher, d_out: Tensor, x: Inputs, norm_weight: Tensor | None, states: RowStates, work: Work, gradients: Inputs
) -> Tensor | None:
    """Writes the token gradients into ``gradients``, which may be views of one tensor; returns that of norm_weight, ``(H, V)``."""
    num_heads = x.query.shape[1]
    key_dim, value_dim = int(x.query.shape[2]), int(x.value.shape[2])
    config = launch_config(key_dim, value_dim, x.query.dtype, is_hopper(x.query.device))
    dot = _dot_type(x.query.dtype, config)
    is_pure = run is traced_launch or not is_hopper(x.query.device)
    num_splits, num_slots = work.splits.shape[0], work.slot_offsets.shape[0] - 1
    # entries of the table past the last class are not launched
    num_short = work.short_rows.shape[0] if work.class_ends is None else work.class_ends[-1]
    has_short = work.has_short and config.num_key_blocks == 1
    key_flags = {"HAS_GATE": x.key_gate is not None, "RELU": work.use_relu, "DOT": dot}
    output_flags = {
        "HAS_OUTPUT_GATE": x.output_gate is not None,
        "HAS_NORM": norm_weight is not None,
        "NORMALIZE": work.normalize,
        "RELU": work.use_relu,
        "DOT": dot,
    }
    key_gate = x.key if x.key_gate is None else x.key_gate
    d_key_gate = gradients.key if gradients.key_gate is None else gradients.key_gate
    output_gate = x.query if x.output_gate is None else x.output_gate
    d_output_gate = gradients.query if gradients.output_gate is None else gradients.output_gate
    weight = x.query if norm_weight is None else norm_weight
    if d_out.stride(2) != 1:
        d_out = d_out.contiguous()
    key_strides = (*_strides(x.key), *_strides(x.value), *_strides(x.key_gate))
    d_key_strides = (*_strides(gradients.key), *_strides(gradients.value), *_strides(gradients.key_gate))
    num_shares = (num_splits if work.has_splits else 0) + (num_short if has_short else 0)
    d_weights = states.state.new_empty(num_shares if norm_weight is not None else 0, num_heads, value_dim)
    d_norm_weight = None if norm_weight is None else norm_weight.new_empty(num_heads, value_dim)
    if has_short:
        for rows, first, longer_than, is_tiny, kernel in _short_rows(work, config.tiny_rows_backward, config.row_backward):
            run(tiny_row_backward_kernel if is_tiny else row_backward_kernel, (rows.shape[0] * num_heads,))(
                *(x.query, x.key, x.value, key_gate, output_gate, weight, d_out),
                *(gradients.query, gradients.key, gradients.value, d_key_gate, d_output_gate, d_weights, rows, first),
                *(*_strides(x.query), *key_strides, *_strides(x.output_gate), *_strides(d_out)),
                *(*_strides(gradients.query), *d_key_strides, *_strides(gradients.output_gate)),
                *(num_heads, work.eps),
                LONGER_THAN=longer_than,
                **output_flags | key_flags,
                **({} if is_tiny else {"IS_PURE": is_pure}),
                **_options(run, x, kernel, config, slices=False),
            )
    partial = d_states = states
    if work.has_splits:
        partial = new_states(x, num_splits)
        d_states = new_states(x, num_slots)
        # in place of stats, their gradients have the bracket <S, dS> + <n, dn>
        run(query_backward_kernel, (num_splits * num_heads * config.num_key_blocks,))(
            *(x.query, output_gate, weight, d_out, gradients.query, d_output_gate, work.splits),
            *(states.state, states.normalizer, states.stats, partial.state, partial.normalizer, partial.stats),
            d_weights,
            num_short if has_short else 0,
            *(*_strides(x.query), *_strides(x.output_gate), *_strides(d_out)),
            *(*_strides(gradients.query), *_strides(gradients.output_gate), num_heads, work.eps),
            **output_flags,
            IS_PURE=is_pure,
            **_options(run, x, config.query_backward, config),
        )
    block, num_blocks = _combine_blocks(key_dim, config)
    share_programs = 0 if d_norm_weight is None else triton.cdiv(int(num_heads * value_dim), SHARE_COLUMNS)
    fold = work.fold if config.num_key_blocks == 1 else 0
    combines = work.has_splits and not (fold and work.is_folded)
    state_programs = num_slots * num_heads * num_blocks if combines else 0
    # no branch on a size that may be symbolic
    if d_norm_weight is not None or combines:
        run(combine_gradients_kernel, (share_programs + state_programs,))(
            *(partial.state, partial.normalizer, partial.stats, work.slot_offsets),
            *(d_states.state, d_states.normalizer, d_states.stats),
            *(d_weights, d_weights if d_norm_weight is None else d_norm_weight, num_shares, share_programs),
            *(fold, num_heads),
            **{"K": key_dim, "V": value_dim, "BK": block, "BV": config.value_block},
            **{"WIDTH": int(num_heads * value_dim), "ROWS": SHARE_ROWS, "COLUMNS": SHARE_COLUMNS, "num_warps": 2},
        )
    if work.has_splits:
        run(key_backward_kernel, (num_splits * num_heads * work.key_pieces,))(
            *(x.key, x.value, key_gate, gradients.key, gradients.value, d_key_gate, work.splits, work.slot_offsets),
            *(states.stats, partial.state, partial.normalizer, partial.stats),
            *(d_states.state, d_states.normalizer, d_states.stats, fold, work.key_pieces),
            *(*key_strides, *d_key_strides, num_heads),
            **key_flags,
            **_options(run, x, config.key_backward, config),
        )
    return d_norm_weight


def _short_rows(work: Work, tiny: tuple[KernelConfig, ...], longer: KernelConfig) -> Iterator[tuple[Tensor, int, int, bool, KernelConfig]]:
    """Entries of each class of short rows, index of the first, tokens that its rows exceed, whether it is tiny, launch parameters."""
    bounds = (0, *TINY_ROW_LIMITS)
    for i, kernel in enumerate((*tiny, longer)):
        if work.class_ends is None:
            # any order: every launch looks for its rows
            yield work.short_rows, 0, bounds[i], i < len(tiny), kernel
        else:
            first, end = work.class_ends[i - 1] if i else 0, work.class_ends[i]
            if first < end:
                yield work.short_rows[first:end], first, bounds[i], i < len(tiny), kernel


def new_states(x: Inputs, count: Any) -> RowStates:
    """Room for ``count`` states, not written."""
    _, num_heads, key_dim = x.query.shape
    value_dim = x.value.shape[2]

    def new(*shape: Any) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.query.device)

    return RowStates(new(count, num_heads, key_dim, value_dim), new(count, num_heads, key_dim), new(count, num_heads, 2))


def _combine_blocks(key_dim: int, config: LaunchConfig) -> tuple[int, int]:
    """Small slices, since few rows are combined: key block, and their number."""
    block = min(config.key_block, 256 // config.value_block)
    return block, -(-key_dim // block)
