"""Keyed dropout is a pure function of the token's key and drops the right share; the kernel equals the formula bit for bit."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, keyed_dropout
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.keyed_dropout.reference import MULTIPLIERS, mix64, wrap64

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
KEYS = st.lists(st.one_of(st.integers(-(2**63), 2**63 - 1), st.sampled_from([0, 1, -1, 2**63 - 1, -(2**63)])), max_size=40)
WIDTHS = st.one_of(st.integers(1, 9), st.sampled_from([127, 128, 129, 260]))


def dropped(x: Tensor, keys: Tensor | None, probability: float, salt: int, residual: Tensor | None = None) -> Tensor:
    return keyed_dropout(x, keys, probability, salt, residual=residual, backend=Backend.REFERENCE)


def test_mix64_is_splitmix64() -> None:
    # the first outputs of the published generator for seeds 0 and 1234567 (Vigna's splitmix64.c)
    for seed, expected in ((0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)):
        assert int(mix64(torch.tensor(seed))) % 2**64 == expected


@given(probability=st.sampled_from([0.1, 0.37, 0.5, 0.9]), width=st.integers(1, 9), salt=st.integers(0, 2000))
def test_drops_the_asked_share_and_keeps_the_mean(probability: float, width: int, salt: int) -> None:
    found = dropped(torch.ones(4000, width), torch.arange(4000) * 977, probability, salt)
    share = float((found == 0).double().mean())
    deviation = (probability * (1 - probability) / found.numel()) ** 0.5
    assert abs(share - probability) < 5 * deviation
    assert torch.allclose(found[found != 0], torch.tensor(1 / (1 - probability)))


def test_mask_depends_on_the_key_and_the_salt_only() -> None:
    keys = torch.tensor([5, 9, 5, -(2**62)])
    mask = dropped(torch.ones(4, 64), keys, 0.5, 1)
    assert torch.equal(mask[0], mask[2])
    assert not torch.equal(mask[0], mask[1])
    assert torch.equal(mask[[1, 3]], dropped(torch.ones(2, 64), keys[[1, 3]], 0.5, 1))
    assert not torch.equal(mask, dropped(torch.ones(4, 64), keys, 0.5, 2))


@pytest.mark.parametrize("backend", list(Backend))
def test_no_keys_or_no_probability_drop_nothing(backend: Backend) -> None:
    x, residual = torch.randn(2, 3, 4)
    for keys, probability in ((None, 0.5), (torch.arange(3), 0.0)):
        assert keyed_dropout(x, keys, probability, 0, backend=backend) is x
        assert torch.equal(keyed_dropout(x, keys, probability, 0, residual=residual, backend=backend), residual + x)


def test_four_neighbours_share_the_hash_of_their_key_and_column() -> None:
    keys, salt = torch.tensor([5, -(2**62), 2**63 - 1]), 3
    hashed = mix64(keys + wrap64(salt * MULTIPLIERS[1]))
    for column in range(6):
        draws = mix64(hashed + wrap64(column * MULTIPLIERS[2])).view(torch.int16).view(3, 4)
        mask = dropped(torch.ones(3, 24), keys, 0.5, salt)[:, 4 * column : 4 * column + 4]
        assert torch.equal(mask > 0, draws >= 0)


@pytest.mark.parametrize("device", DEVICES)
@given(
    keys=KEYS,
    width=WIDTHS,
    probability=st.sampled_from([2**-16, 0.1, 0.37, 0.5, 0.9]),
    salt=st.one_of(st.integers(0, 3000), st.just(2**31 - 1)),
    dtypes=st.sampled_from(
        [(torch.float32, None), (torch.float32, torch.float32), (torch.float16, torch.float16), (torch.float16, torch.float32)]
        + ([] if INTERPRETED else [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
    ),
    is_strided=st.booleans(),
)
def test_kernel_is_the_formula_bit_for_bit_forward_and_backward(
    device: str,
    keys: list[int],
    width: int,
    probability: float,
    salt: int,
    dtypes: tuple[torch.dtype, torch.dtype | None],
    is_strided: bool,
) -> None:
    generator = torch.Generator().manual_seed(len(keys))
    values = torch.randn(3, len(keys), 2 * width, generator=generator).to(device)
    columns = slice(0, 2 * width, 2) if is_strided else slice(width)
    token_keys = torch.tensor(keys, dtype=torch.int64, device=device)
    upstream = values[2, :, :width].to(dtypes[0] if dtypes[1] is None else torch.promote_types(*dtypes))
    found = []
    for backend in Backend:
        x = values[0, :, columns].to(dtypes[0]).requires_grad_()
        residual = None if dtypes[1] is None else values[1, :, columns].to(dtypes[1]).requires_grad_()
        out = keyed_dropout(x, token_keys, probability, salt, residual=residual, backend=backend)
        found.append([out, *torch.autograd.grad(out, [x] if residual is None else [x, residual], upstream)])
    for reference, kernel in zip(*found, strict=True):
        assert kernel.dtype == reference.dtype and torch.equal(kernel, reference)


@pytest.mark.parametrize("device", DEVICES)
def test_every_element_is_written(device: str, poisoned_memory: None) -> None:
    keys = torch.arange(33, device=device)
    out = keyed_dropout(torch.ones(33, 130, device=device), keys, 0.5, 7, backend=Backend.TRITON)
    assert set(out.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("device", DEVICES)
def test_a_draw_at_the_bound_is_kept(device: str) -> None:
    # half a million draws: some are the lowest there is, which is all that this probability drops, and some the next
    x, keys = torch.ones(1024, 512, device=device), torch.arange(1024, device=device)
    reference, kernel = (keyed_dropout(x, keys, 2**-16, 0, backend=backend) for backend in Backend)
    assert (reference == 0).any() and torch.equal(kernel, reference)


@pytest.mark.gpu
def test_compiled_equals_eager() -> None:
    compiled = torch.compile(keyed_dropout, fullgraph=True, dynamic=True)
    for num_tokens, salt in ((17, 5), (64, 6), (1000, 2**31 - 1)):
        # away from zero, so that no rounding makes a kept element look like a dropped one
        x, residual = (1 + torch.rand(num_tokens, 96, device="cuda")).bfloat16(), torch.rand(num_tokens, 96, device="cuda").bfloat16()
        keys = torch.arange(num_tokens, device="cuda") * 7919
        expected = keyed_dropout(x, keys, 0.3, salt, residual=residual, backend=Backend.TRITON)
        found = compiled(x, keys, 0.3, salt, residual=residual, backend=Backend.TRITON)
        differing = (found == residual) != (expected == residual)
        assert not differing.any(), f"{num_tokens} tokens, salt {salt}: {float(differing.float().mean()):.3%} of the mask differs"
        # the compiler leaves out the rounding between product and sum
        assert torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=2**-7)


def test_bad_arguments_are_named() -> None:
    x, keys = torch.ones(3, 4), torch.arange(3)
    for probability in (-0.1, 1.0):
        with pytest.raises(ValueError, match=r"probability must lie in \[0, 1\), got"):
            dropped(x, keys, probability, 0)
    with pytest.raises(ValueError, match=r"token_keys must have shape \(L,\) = \(3,\), got \(2,\)"):
        dropped(x, keys[:2], 0.5, 0)
    with pytest.raises(ValueError, match=r"token_keys must be int64, got torch\.int32"):
        dropped(x, keys.int(), 0.5, 0)
    with pytest.raises(ValueError, match=r"salt must be at least 0 and below 2\^31, got -1"):
        dropped(x, keys, 0.5, -1)
    with pytest.raises(ValueError, match=r"residual must have shape \(L, D\) = \(3, 4\), got \(3, 5\)"):
        dropped(x, keys, 0.5, 0, torch.ones(3, 5))
    with pytest.raises(NotImplementedError, match="got fp64") if INTERPRETED else pytest.raises(ValueError, match="needs CUDA tensors"):
        keyed_dropout(x.double(), keys, 0.5, 0, backend=Backend.TRITON)
