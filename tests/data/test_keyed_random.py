"""Keyed random numbers are pinned, spread evenly and depend on every key."""

import numpy as np

from gbla_rec.data.keyed_random import keyed_permutation, keyed_sequence, keyed_uint64, keyed_uniform

# the first is SplitMix64's published first output for seed 0
PINNED = ["0xe220a8397b1dcdaf", "0xbcd9dbb49673066b", "0xf7f1454e6a8a1fa6", "0xf7f1454e6a8a1fa6"]
PINNED_PERMUTATION = [7, 5, 6, 1, 4, 3, 0, 2]


def test_values_are_pinned() -> None:
    assert [hex(int(keyed_uint64(*keys)[0])) for keys in ((0,), (1, 2), (-1, 2**63), (2**64 - 1, 2**63))] == PINNED
    assert keyed_permutation(8, 1, 2).tolist() == PINNED_PERMUTATION


def test_every_key_counts_and_so_does_the_order() -> None:
    places = np.arange(3, dtype=np.int64)
    keys = [keyed_uint64(1, 2, places), keyed_uint64(2, 1, places), keyed_uint64(1, 3, places), keyed_uint64(1, places, 7)]
    keys += [keyed_sequence(keyed_uint64(1), places)]
    assert len(np.unique(np.concatenate(keys))) == 15


def test_uniform_numbers_are_uniform() -> None:
    numbers = np.concatenate([keyed_uniform(5, user, np.arange(100, dtype=np.int64)) for user in range(1000)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    # 6 standard deviations of the mean and of a decile's count
    assert abs(numbers.mean() - 0.5) < 6 * 0.289 / np.sqrt(len(numbers))
    assert np.all(np.abs(np.histogram(numbers, 10, (0, 1))[0] - 10_000) < 6 * 95)


def test_a_permutation_has_every_place_once() -> None:
    for length in (0, 1, 2, 1000):
        assert sorted(keyed_permutation(length, 3)) == list(range(length))
