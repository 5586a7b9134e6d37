"""Block sizes, warps and pipeline stages of the kernels: a table, not a search, so that no first call waits for tuning.

Measured on Hopper (``benchmarks/linear_attention.py``). Other architectures run the same parameters where they fit 99 KiB of shared memory.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton

from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.row_splits import TINY_ROW_LIMITS

HOPPER = 9
"""Compute capability, major."""
MAX_WIDTH = 256
"""Largest key and value width."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelConfig:
    """Launch parameters of one kernel.

    Attributes:
        max_registers: of a thread, where a few less let a multiprocessor hold a program more. torch's compiler cannot pass it on.
    """

    block_tokens: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchConfig:
    """Launch parameters for one (K, V, dtype).

    Attributes:
        key_block: keys of a slice of the state; ``key_block * num_key_blocks >= K``.
        num_key_blocks: 1, unless a state is too large for one program; then there is no path for short rows.
        value_block: ``V`` rounded up to a power of two.
        state_for_backward: of a forward whose gradients are wanted; it makes a product more.
        tiny_rows: one for each of ``TINY_ROW_LIMITS``.
    """

    key_block: int
    num_key_blocks: int
    value_block: int
    state: KernelConfig
    state_for_backward: KernelConfig
    output: KernelConfig
    tiny_rows: tuple[KernelConfig, ...]
    row: KernelConfig
    query_backward: KernelConfig
    key_backward: KernelConfig
    tiny_rows_backward: tuple[KernelConfig, ...]
    row_backward: KernelConfig


def _kernel(block_tokens: int, num_warps: int, num_stages: int, max_registers: int | None = None) -> KernelConfig:
    return KernelConfig(block_tokens=block_tokens, num_warps=num_warps, num_stages=num_stages, max_registers=max_registers)


def _same(config: KernelConfig) -> dict[str, KernelConfig]:
    return dict.fromkeys(("state", "state_for_backward", "output", "row", "query_backward", "key_backward", "row_backward"), config)


def _without_limits(kernels: dict[str, KernelConfig]) -> dict[str, KernelConfig]:
    return {name: replace(kernel, max_registers=None) for name, kernel in kernels.items()}


# bf16: by the larger of key_block and value_block
_HALF = {
    64: {
        "state": _kernel(64, 4, 3),
        "state_for_backward": _kernel(64, 4, 3),
        "output": _kernel(64, 4, 3),
        "row": _kernel(64, 4, 3, 128),
        "query_backward": _kernel(64, 4, 3),
        "key_backward": _kernel(64, 4, 3),
        "row_backward": _kernel(64, 4, 2),
    },
    128: {
        "state": _kernel(32, 4, 3),
        "state_for_backward": _kernel(32, 4, 3),
        "output": _kernel(64, 4, 3),
        "row": _kernel(64, 8, 2, 128),
        "query_backward": _kernel(32, 8, 3),
        "key_backward": _kernel(64, 8, 3),
        "row_backward": _kernel(32, 8, 3),
    },
}
# what fits 99 KiB of shared memory; compiled, not measured
_ELSEWHERE = {
    "output": _kernel(64, 4, 2),
    "query_backward": _kernel(32, 8, 2),
    "key_backward": _kernel(32, 4, 2),
    "row_backward": _kernel(32, 8, 2),
}
_HALF_ELSEWHERE = {64: _without_limits(_HALF[64]), 128: _without_limits(_HALF[128]) | _ELSEWHERE}
# operands of four bytes: fp32, fp16, and states too large for one program
_FULL = {64: _same(_kernel(32, 4, 2)), 128: _same(_kernel(32, 8, 1)), 256: _same(_kernel(16, 8, 1))}
# warps by the same width, for each of TINY_ROW_LIMITS
_TINY_WARPS = {64: (1, 2, 4), 128: (2, 4, 4), 256: (4, 4, 8)}
_NO_LIMITS = (None,) * len(TINY_ROW_LIMITS)
# bf16 on Hopper
_TINY_REGISTERS: dict[int, tuple[int | None, ...]] = {64: (96, 96, 128), 128: (80, None, 168)}
_TINY_BACKWARD_REGISTERS: dict[int, tuple[int | None, ...]] = {64: (128, 168, None), 128: _NO_LIMITS}
_TINY_BACKWARD_WARPS = {64: (2, 4, 4), 128: (2, 4, 8), 256: (4, 8, 8)}


def _tiny(num_warps: tuple[int, ...], max_registers: tuple[int | None, ...]) -> tuple[KernelConfig, ...]:
    return tuple(_kernel(limit, warps, 1, most) for limit, warps, most in zip(TINY_ROW_LIMITS, num_warps, max_registers, strict=True))


@lru_cache(maxsize=16)
def is_hopper(device: torch.device) -> bool:
    """False for a GPU of another compute capability than 9."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] == HOPPER


@lru_cache(maxsize=256)
def launch_config(key_dim: int, value_dim: int, dtype: torch.dtype, for_hopper: bool = True) -> LaunchConfig:
    """Launch parameters for ``K``, ``V`` (at most ``MAX_WIDTH``), the dtype of query, and Hopper or another GPU."""
    value_block = max(triton.next_power_of_2(value_dim), 16)
    key_block = max(triton.next_power_of_2(key_dim), 16)
    # a slice of the state is a dot operand in shared memory and an accumulator in registers
    is_half = dtype == torch.bfloat16 and value_block <= 128 and key_block <= 128
    key_block = min(key_block, 128 if is_half or max(key_block, value_block) <= 64 else 64)
    if 32 < key_dim <= 64 and value_block > 128 and dtype != torch.bfloat16:
        # whole, the state would make backward take 322 KiB; 88 in bf16
        key_block = 32
    width = max(64, key_block, value_block)
    half = _HALF if for_hopper else _HALF_ELSEWHERE
    kernels = (half if is_half else _FULL)[width]
    if INTERPRETED:
        # cost follows the number of blocks
        kernels = _same(_kernel(64, 4, 1))
    has_limits = is_half and for_hopper and not INTERPRETED
    return LaunchConfig(
        key_block=key_block,
        num_key_blocks=-(-key_dim // key_block),
        value_block=value_block,
        tiny_rows=_tiny(_TINY_WARPS[width], _TINY_REGISTERS[width] if has_limits else _NO_LIMITS),
        tiny_rows_backward=_tiny(_TINY_BACKWARD_WARPS[width], _TINY_BACKWARD_REGISTERS[width] if has_limits else _NO_LIMITS),
        **kernels,
    )
