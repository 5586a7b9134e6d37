"""Laws of the rotary embedding, on the reference and on the kernel (interpreted on the CPU, compiled on a GPU)."""

from functools import partial

import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.rotary.api import rotary_embedding
from gbla_kernels.rotary.autograd import rotary_op
from gbla_kernels.testing.error_budget import assert_within_budget, relative_error

TRITON = [pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter"))]
DEVICES = [*TRITON, pytest.param("cuda", marks=pytest.mark.gpu)]
BASE = 10_000.0
LENGTHS = [3, 0, 1, 41]


def heads(num_tokens: int, dtype: torch.dtype, device: str, *, num_heads: int = 3, head_dim: int = 12, seed: int = 0) -> list[Tensor]:
    """Query and key as views of one projection that also holds a value."""
    generator = torch.Generator().manual_seed(seed)
    projection = torch.randn(num_tokens, 3, num_heads, head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
    return list(projection.unbind(1)[:2])


def turned(query: Tensor, key: Tensor, *, positions: Tensor, backend: Backend) -> Tensor:
    return torch.stack(rotary_embedding(query, key, positions, base=BASE, backend=backend))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_reference_to_rounding_at_any_position(device: str, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 7, 4095, 131_071, 99_991], device=device)
    query, key = heads(6, dtype, device)
    kernel, reference = (partial(turned, positions=positions, backend=backend) for backend in (Backend.TRITON, Backend.REFERENCE))
    # the interpreter cuts bf16 off instead of rounding it: twice the error
    factor = 4.0 if INTERPRETED and dtype == torch.bfloat16 else 2.0
    assert_within_budget(kernel, reference, {"query": query, "key": key}, factor=factor)


def test_reference_angles_are_exact_far_from_the_start() -> None:
    query, key = heads(2, torch.float32, "cpu")
    positions = torch.tensor([131_071, 100_003])
    exact = turned(query.double(), key.double(), positions=positions, backend=Backend.REFERENCE)
    assert relative_error(turned(query, key, positions=positions, backend=Backend.REFERENCE), exact) < 2e-7


@pytest.mark.parametrize("device", DEVICES)
def test_packed_batch_is_each_row_alone(device: str) -> None:
    layout = JaggedLayout.from_lengths(LENGTHS)
    query, key = heads(layout.num_tokens, torch.float32, device)
    packed = turned(query, key, positions=layout.positions.to(device), backend=Backend.TRITON)
    for start, length in zip(layout.offsets_cpu.tolist(), LENGTHS, strict=False):
        rows = slice(start, start + length)
        alone = turned(query[rows], key[rows], positions=torch.arange(length, device=device), backend=Backend.TRITON)
        assert torch.equal(packed[:, rows], alone)


@pytest.mark.parametrize("device", DEVICES)
def test_gradient_is_the_inverse_rotation(device: str) -> None:
    layout = JaggedLayout.from_lengths(LENGTHS)
    positions = layout.positions.to(device)
    query, key = (x.detach().requires_grad_() for x in heads(layout.num_tokens, torch.float32, device))
    upstream = heads(layout.num_tokens, torch.float32, device, seed=1)
    outputs = rotary_embedding(query, key, positions, base=BASE, backend=Backend.TRITON)
    gradients = torch.autograd.grad(outputs, [query, key], upstream)
    again = rotary_embedding(*gradients, positions, base=BASE, backend=Backend.TRITON)
    for turned_back, original in zip(again, upstream, strict=True):
        assert relative_error(turned_back, original) < 4e-7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 2), (9, 6)])
def test_every_width_and_number_of_heads_is_written_in_full(device: str, num_heads: int, head_dim: int, poisoned_memory: None) -> None:
    query, key = heads(5, torch.float32, device, num_heads=num_heads, head_dim=head_dim)
    kernel, reference = (
        partial(turned, positions=torch.arange(5, device=device), backend=backend) for backend in (Backend.TRITON, Backend.REFERENCE)
    )
    assert_within_budget(kernel, reference, {"query": query, "key": key})


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs_equal_contiguous_ones(device: str) -> None:
    query, key = heads(33, torch.float32, device)
    positions = torch.arange(33, device=device)
    strided = turned(query, key, positions=positions, backend=Backend.TRITON)
    assert torch.equal(strided, turned(query.contiguous(), key.contiguous(), positions=positions, backend=Backend.TRITON))
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key)]
    assert torch.equal(strided, turned(*transposed, positions=positions, backend=Backend.TRITON))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", list(Backend))
def test_empty_batch_gives_empty_outputs_and_gradients(device: str, backend: Backend) -> None:
    query, key = (x.detach().requires_grad_() for x in heads(0, torch.float32, device))
    outputs = rotary_embedding(query, key, torch.zeros(0, dtype=torch.int64, device=device), backend=backend)
    assert all(output.shape == (0, 3, 12) for output in outputs)
    gradients = torch.autograd.grad(sum(output.sum() for output in outputs), [query, key])
    assert all(gradient.shape == (0, 3, 12) for gradient in gradients)


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_passes(device: str) -> None:
    query, key = (x.detach().requires_grad_() for x in heads(7, torch.float32, device))
    torch.library.opcheck(rotary_op, (query, key, torch.arange(7, device=device), BASE, False))


def test_bad_arguments_are_named() -> None:
    query, key = heads(4, torch.float32, "cpu")
    positions = torch.arange(4)
    refused = partial(rotary_embedding, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match=r"key must have shape \(L, H, K\)"):
        refused(query, key[:3], positions)
    with pytest.raises(ValueError, match=r"positions must be int64, got torch\.int32"):
        refused(query, key, positions.int())
    with pytest.raises(ValueError, match="must be even and positive"):
        refused(query[..., :5], key[..., :5], positions)
    with pytest.raises(NotImplementedError, match="got fp64"):
        rotary_embedding(query.double(), key.double(), positions, backend=Backend.TRITON)
