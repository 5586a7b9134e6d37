"""Keyed dropout is a pure function of the token's key and drops the right share."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.models import keyed_dropout as keyed_dropout_module
from gbla_rec.models.keyed_dropout import keyed_dropout, mix64, wrap64


def test_mix64_is_splitmix64() -> None:
    # the first outputs of the published generator for seeds 0 and 1234567 (Vigna's splitmix64.c)
    for seed, expected in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        assert int(mix64(torch.tensor(seed))) % 2**64 == expected


@given(probability=st.sampled_from([0.1, 0.37, 0.5, 0.9]), width=st.integers(1, 9), salt=st.integers(0, 2000))
def test_drops_the_asked_share_and_keeps_the_mean(probability: float, width: int, salt: int) -> None:
    keys = torch.arange(4000) * 977
    dropped = keyed_dropout(torch.ones(4000, width), keys, probability, salt)
    share = float((dropped == 0).double().mean())
    deviation = (probability * (1 - probability) / dropped.numel()) ** 0.5
    assert abs(share - probability) < 5 * deviation
    assert torch.allclose(dropped[dropped != 0], torch.tensor(1 / (1 - probability)))


def test_mask_depends_on_the_key_and_the_salt_only() -> None:
    keys = torch.tensor([5, 9, 5, -(2**62)])
    mask = keyed_dropout(torch.ones(4, 64), keys, 0.5, 1)
    assert torch.equal(mask[0], mask[2])
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask[[1, 3]], keyed_dropout(torch.ones(2, 64), keys[[1, 3]], 0.5, 1))
    assert not torch.equal(mask, keyed_dropout(torch.ones(4, 64), keys, 0.5, 2))


def test_no_keys_or_no_probability_change_nothing() -> None:
    x = torch.randn(3, 4)
    assert keyed_dropout(x, None, 0.5, 0) is x
    assert keyed_dropout(x, torch.arange(3), 0.0, 0) is x


def test_four_neighbours_share_the_hash_of_their_key_and_column() -> None:
    keys, salt, multipliers = torch.tensor([5, -(2**62), 2**63 - 1]), 3, keyed_dropout_module._MULTIPLIERS
    hashed = mix64(keys + wrap64(salt * multipliers[1]))
    for column in range(6):
        draws = mix64(hashed + wrap64(column * multipliers[2])).view(torch.int16).view(3, 4)
        mask = keyed_dropout(torch.ones(3, 24), keys, 0.5, salt)[:, 4 * column : 4 * column + 4]
        assert torch.equal(mask > 0, draws >= 0)
