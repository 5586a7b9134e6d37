"""Multi-hash row numbers of items: seeded, and the same on every machine, version and rank."""

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_INCREMENT = np.uint64(0x9E3779B97F4A7C15)


def mix64(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): a bijection of 64-bit words whose output bits look random."""
    with np.errstate(over="ignore"):
        x = x + _INCREMENT
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def item_keys(item_ids: Sequence[int] | Sequence[str] | NDArray[np.int64]) -> NDArray[np.uint64]:
    """64-bit keys of original item ids: integers as they are, strings by the first 8 bytes (little-endian) of BLAKE2b."""
    if len(item_ids) and isinstance(item_ids[0], str):
        digests = b"".join(hashlib.blake2b(str(item).encode(), digest_size=8).digest() for item in item_ids)
        return np.frombuffer(digests, dtype="<u8").astype(np.uint64)
    keys: NDArray[np.uint64] = np.asarray(item_ids, dtype=np.int64).view(np.uint64)
    return keys


def hash_rows(item_ids: Sequence[int] | Sequence[str] | NDArray[np.int64], num_hashes: int, num_rows: int, seed: int) -> NDArray[np.int64]:
    """Table rows of each item under each hash function.

    Args:
        item_ids: ``(N,)`` original ids, so that an item keeps its rows when the catalogue grows.
        num_hashes: independent hash functions, one table each.
        num_rows: rows of each table.
        seed: changes all functions.

    Returns:
        ``(num_hashes, N)`` int64 in ``[0, num_rows)``.
    """
    keys = item_keys(item_ids)
    seed_key: NDArray[np.uint64] = mix64(np.array([seed], dtype=np.int64).view(np.uint64))
    seeds = mix64(np.add(seed_key, np.arange(num_hashes, dtype=np.uint64), dtype=np.uint64))
    rows: NDArray[np.int64] = (mix64(keys[None, :] ^ seeds[:, None]) % np.uint64(num_rows)).astype(np.int64)
    return rows
