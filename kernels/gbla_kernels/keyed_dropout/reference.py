"""Dropout by token keys, as the formula reads: the hash of a key and a column decides."""

# L tokens, D width (docs/shapes.md)

import torch
from torch import Tensor

MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""SplitMix64's constants (Steele, Lea and Flood, OOPSLA 2014) as signed 64-bit integers."""


def wrap64(value: int) -> int:
    """A Python integer modulo 2**64, as a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


INVERSE, SALT_INVERSE = (wrap64(pow(multiplier, -1, 1 << 64)) for multiplier in (MULTIPLIERS[2], MULTIPLIERS[1]))
"""Of the multipliers of columns and of the salt, modulo 2^64."""


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 tensors: a bijection whose output bits look random."""
    x = x + MULTIPLIERS[0]
    x = (x ^ _logical_shift_right(x, 30)) * MULTIPLIERS[1]
    x = (x ^ _logical_shift_right(x, 27)) * MULTIPLIERS[2]
    return x ^ _logical_shift_right(x, 31)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def threshold(probability: float) -> int:
    """Elements whose 16 bits, as a signed integer, lie below it are dropped: the probability is met to 1 / 65,536."""
    return round(probability * 2**16) - 2**15


def keyed_dropout_reference(x: Tensor, token_keys: Tensor, probability: float, salt: int, residual: Tensor | None) -> Tensor:
    """``x (L, D)`` without the elements that ``token_keys (L,)`` choose, added to ``residual (L, D)`` if there is one."""
    columns = torch.arange((x.shape[1] + 3) // 4, device=x.device)
    # keys + salt * multiplier and keys + columns * multiplier, with no product of salt or columns alone: torch.compile computes with
    # columns in 32 bits, and with a symbolic salt in integers of any size
    keys = mix64((token_keys * SALT_INVERSE + salt) * MULTIPLIERS[1])
    bits = mix64(((keys * INVERSE)[:, None] + columns) * MULTIPLIERS[2])
    # one hash serves four elements, 16 bits each
    draws = bits.view(torch.int16)[:, : x.shape[1]]
    dropped = x * ((draws >= threshold(probability)) * (1 / (1 - probability))).to(x.dtype)
    return dropped if residual is None else residual + dropped
