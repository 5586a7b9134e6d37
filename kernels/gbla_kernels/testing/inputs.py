"""Factories of jagged inputs, and row lengths that find mistakes at block edges."""

# B rows, L tokens, H heads, K key width, V value width, D model width, R conv taps (docs/shapes.md)

from collections.abc import Sequence
from typing import NewType

import torch
from torch import Tensor

from gbla_kernels.layout import JaggedLayout
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT

BLOCK = 64
"""Tokens that a kernel reads at once, mostly."""
NASTY_LENGTHS = (0, 1, 2, 3, 7, BLOCK - 1, BLOCK, BLOCK + 1, SHORT_LIMIT - 1, SHORT_LIMIT, SHORT_LIMIT + 1, 131, SPLIT, SPLIT + 1)
"""Empty, single, primes, and both sides of the edges of blocks, short rows and splits."""

JaggedLengths = NewType("JaggedLengths", list[int])
"""Row lengths of a batch; under hypothesis ``st.from_type(JaggedLengths)`` draws nasty ones (``tests/kernels/conftest.py``)."""


def attention_inputs(
    lengths: Sequence[int],
    *,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    seed: int = 0,
    silent_fraction: float = 0.0,
) -> tuple[dict[str, Tensor], JaggedLayout]:
    """Inputs of ``gated_linear_attention`` by argument name, leaves that want gradients, and their layout.

    Args:
        lengths: tokens of each row.
        num_heads: ``H``.
        key_dim: ``K``.
        value_dim: ``V``.
        dtype: of the tensors.
        device: of the tensors.
        seed: of the values.
        silent_fraction: share of gates set to -inf.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = JaggedLayout.from_lengths(lengths)
    length = layout.num_tokens
    shapes = {
        "query": (length, num_heads, key_dim),
        "key": (length, num_heads, key_dim),
        "value": (length, num_heads, value_dim),
        "key_gate": (length, num_heads),
        "output_gate": (length, num_heads, value_dim),
        "norm_weight": (num_heads, value_dim),
    }
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    tensors["key_gate"] = 3 * tensors["key_gate"]
    if silent_fraction:
        is_silent = torch.rand(shapes["key_gate"], generator=generator) < silent_fraction
        tensors["key_gate"] = tensors["key_gate"].masked_fill(is_silent, -torch.inf)
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}, layout.to(device)


def conv_inputs(
    lengths: Sequence[int], *, dim: int, num_taps: int, dtype: torch.dtype, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[dict[str, Tensor], JaggedLayout]:
    """Inputs of ``causal_conv1d`` by argument name (``x``, ``weight``, ``bias``), leaves that want gradients, and their layout."""
    generator = torch.Generator().manual_seed(seed)
    layout = JaggedLayout.from_lengths(lengths)
    shapes = {"x": (layout.num_tokens, dim), "weight": (dim, num_taps), "bias": (dim,)}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: tensor.to(device, dtype).requires_grad_() for name, tensor in tensors.items()}, layout.to(device)
