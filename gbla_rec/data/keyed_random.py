"""Random numbers that are a function of integer keys, the same on every machine and with every numpy version."""

import numpy as np
from numpy.typing import NDArray

from gbla_rec.data.hashing import mix64

UInt64Array = NDArray[np.uint64]
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def keyed_uint64(*keys: int | NDArray[np.int64]) -> UInt64Array:
    """A uniform uint64 for each tuple of keys; arrays broadcast, integers are taken modulo 2^64."""
    state: UInt64Array = np.zeros(1, np.uint64)
    for key in keys:
        state = mix64(state ^ (np.array([key & (1 << 64) - 1], np.uint64) if isinstance(key, int) else key.view(np.uint64)))
    return state


def keyed_sequence(seeds: UInt64Array, places: NDArray[np.int64]) -> UInt64Array:
    """Element ``places`` of the SplitMix64 sequence of each seed; arrays broadcast."""
    return mix64(seeds + places.view(np.uint64) * _GOLDEN)


def keyed_uniform(*keys: int | NDArray[np.int64]) -> NDArray[np.float64]:
    """A uniform float64 in [0, 1) for each tuple of keys."""
    uniform: NDArray[np.float64] = (keyed_uint64(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return uniform


def keyed_permutation(length: int, *keys: int) -> NDArray[np.int64]:
    """A permutation of ``range(length)`` that depends on the keys only."""
    return np.argsort(keyed_uint64(*keys, np.arange(length, dtype=np.int64)), kind="stable")
