"""Block sizes, warps and pipeline stages of the kernels: a table, not a search, so that no first call waits for tuning."""

# K key width, V value width (docs/shapes.md)

from dataclasses import dataclass

import torch
import triton

MAX_WIDTH = 256
"""Largest key and value width."""


@dataclass(frozen=True, slots=True)
class KernelConfig:
    """Launch parameters of one kernel: a tile of queries against a block of keys."""

    query_tile: int
    key_block: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class LaunchConfig:
    """Launch parameters for one (K, V, dtype).

    Attributes:
        attention: the forward.
        few: the backward of rows with at most ``few.query_tile`` queries.
        many: of rows with more, up to ``many.query_tile``; not used if that is no more.
        tiled: of all other rows.
    """

    attention: KernelConfig
    few: KernelConfig
    many: KernelConfig
    tiled: KernelConfig

    @property
    def tiled_above(self) -> int:
        """Queries of a row that the backward still holds in one tile."""
        return self.many.query_tile

    @property
    def many_above(self) -> int:
        """Queries of a row that the small tile still holds; unlimited where there is no larger tile but the tiled kernel."""
        return self.few.query_tile if self.many.query_tile > self.few.query_tile else 2**31 - 1


def _configs(*kernels: tuple[int, int, int, int]) -> LaunchConfig:
    return LaunchConfig(*(KernelConfig(*kernel) for kernel in kernels))


# by the larger of K and V, rounded up; the largest tiles whose accumulators ptxas keeps in registers
_HALF = {
    64: _configs((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 1)),
    128: _configs((64, 64, 4, 2), (64, 64, 8, 2), (128, 64, 8, 2), (32, 64, 8, 1)),
    256: _configs((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
}
# fp32 and fp16: operands of four bytes, three products each
_FULL = {
    64: _configs((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
    128: _configs((32, 32, 8, 2), (16, 32, 8, 1), (16, 32, 8, 1), (16, 16, 4, 1)),
    256: _configs((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)),
}


def launch_config(key_dim: int, value_dim: int, dtype: torch.dtype) -> LaunchConfig:
    """Launch parameters for ``K``, ``V`` (at most ``MAX_WIDTH``) and the dtype of query."""
    width = max(64, triton.next_power_of_2(max(key_dim, value_dim)))
    return (_HALF if dtype == torch.bfloat16 else _FULL)[width]
