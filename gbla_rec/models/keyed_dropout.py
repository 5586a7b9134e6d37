"""Dropout whose mask is a pure function of the token: the same on any number of ranks and after a resume.

Ordinary dropout draws from a per-process generator, so 1 rank and 2 ranks would see different masks and a resumed run
would need the generator's state. Here each token brings a 64-bit key (made from seed, epoch, user, cut and position).
"""

import torch
from torch import Tensor

_MULTIPLIERS = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
"""SplitMix64's constants (Steele, Lea and Flood, OOPSLA 2014) as signed 64-bit integers."""

_INVERSE = (pow(_MULTIPLIERS[2], -1, 1 << 64) + (1 << 63)) % (1 << 64) - (1 << 63)
"""Of the last multiplier, modulo 2^64."""


def mix64(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 tensors: a bijection whose output bits look random."""
    x = x + _MULTIPLIERS[0]
    x = (x ^ _logical_shift_right(x, 30)) * _MULTIPLIERS[1]
    x = (x ^ _logical_shift_right(x, 27)) * _MULTIPLIERS[2]
    return x ^ _logical_shift_right(x, 31)


def wrap64(value: int) -> int:
    """A Python integer modulo 2**64, as a signed 64-bit integer."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _logical_shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def keyed_dropout(x: Tensor, token_keys: Tensor | None, probability: float, salt: int) -> Tensor:
    """Zero each element with ``probability`` and scale the rest by ``1 / (1 - probability)``.

    Args:
        x: ``(L, D)``, any float dtype.
        token_keys: ``(L,)`` int64; equal keys get equal masks. None leaves x as it is (evaluation).
        probability: in [0, 1); 0 leaves x as it is.
        salt: names the place in the model, so that two dropouts of one token differ.
    """
    if token_keys is None or probability == 0:
        return x
    columns = torch.arange((x.shape[1] + 3) // 4, device=x.device)
    keys = mix64(token_keys + wrap64(salt * _MULTIPLIERS[1]))
    # keys + columns * multiplier, with no product of columns alone: torch.compile takes an index for 32 bits
    bits = mix64(((keys * _INVERSE)[:, None] + columns) * _MULTIPLIERS[2])
    # one hash serves four elements, 16 bits each, so the probability is met to 1 / 65536
    draws = bits.view(torch.int16)[:, : x.shape[1]]
    is_kept = draws >= round(probability * 2**16) - 2**15
    return x * (is_kept * (1 / (1 - probability))).to(x.dtype)
