"""The laws of the causal convolutions, as functions of an implementation under test and a jagged batch."""

# B rows, L tokens, D model width, R conv taps (docs/shapes.md)

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.testing.error_budget import assert_within_budget, outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import conv_inputs

Tensors = dict[str, Tensor | None]
"""Arguments by name: ``x`` and parameters, None where absent."""


@dataclass(frozen=True, kw_only=True)
class ConvSubject:
    """An op with the signature of ``causal_conv1d``, perhaps with a norm before it, and what it is tested with."""

    op: Callable[..., Tensor]
    backend: Backend
    dtype: torch.dtype
    parameter_dtype: torch.dtype | None = None
    device: str = "cpu"
    dim: int = 20
    num_taps: int = 4
    activation: str | None = "silu"
    has_bias: bool = True
    has_norm: bool = False

    def inputs(self, lengths: Sequence[int], seed: int) -> tuple[Tensors, JaggedLayout]:
        """Random inputs by argument name, leaves that want gradients, and their layout."""
        made, layout = conv_inputs(lengths, dim=self.dim, num_taps=self.num_taps, dtype=torch.float64, seed=seed)
        if self.has_norm:
            made["norm_weight"] = 1 + 0.3 * torch.randn(self.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        tensors: Tensors = {}
        for name, tensor in made.items():
            dtype = self.dtype if name == "x" else self.parameter_dtype or self.dtype
            tensors[name] = tensor.detach().to(self.device, dtype).requires_grad_()
        if not self.has_bias:
            tensors["bias"] = None
        return tensors, layout.to(self.device)

    def call(self, layout: JaggedLayout, /, **changes: Any) -> Callable[..., Tensor]:
        """The op as a function of its tensors."""
        options = {"offsets": layout.offsets, "layout": layout, "activation": self.activation, "backend": self.backend}
        return partial(self.op, **{**options, **changes})


def _assert_same(subject: ConvSubject, actual: Tensor, expected: Tensor, what: str) -> None:
    """Bit for bit; on the reference to rounding, since torch computes the ends of vectors differently on the CPU."""
    if subject.backend is Backend.TRITON:
        assert torch.equal(actual, expected), what
    else:
        assert relative_error(actual, expected) <= 4 * torch.finfo(subject.dtype).eps, what


Law = Callable[[ConvSubject, Sequence[int], int], None]


def output_and_gradients_equal_fp64(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Within twice the error of the reference, which computes in fp32 and rounds once."""
    tensors, layout = subject.inputs(lengths, seed)
    assert_within_budget(subject.call(layout), subject.call(layout, backend=Backend.REFERENCE), tensors, seed=seed)


def packed_batch_is_each_row_alone_bit_for_bit(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Output and gradient of x are those of each row alone; gradients of parameters add."""
    tensors, layout = subject.inputs(lengths, seed)
    x, d_y = tensors["x"], _output_gradient(subject, layout, seed)
    assert x is not None
    packed = _results(subject.call(layout), tensors, d_y)
    alone_parameters: dict[str, list[Tensor]] = {name: [] for name in packed if name not in ("output", "d_x")}
    for start, length in zip(layout.offsets_cpu.tolist(), layout.row_lengths, strict=False):
        row = slice(start, start + length)
        alone_layout = JaggedLayout.from_lengths([length]).to(subject.device)
        alone = _results(subject.call(alone_layout), {**tensors, "x": x[row]}, d_y[row])
        for name in ("output", "d_x"):
            _assert_same(subject, alone[name], packed[name][row], f"{name} of the row at {start}")
        for name, gradients in alone_parameters.items():
            gradients.append(alone[name].double())
    for name, gradients in alone_parameters.items():
        # gradients of rows may cancel: their sizes bound the rounding
        scale = sum(float(gradient.norm()) for gradient in gradients)
        error = float((packed[name].double() - sum(gradients)).norm())
        assert error <= 16 * torch.finfo(packed[name].dtype).eps * scale, name


def _output_gradient(subject: ConvSubject, layout: JaggedLayout, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(layout.num_tokens, subject.dim, generator=generator).to(subject.device, subject.dtype)


def _results(op: Callable[..., Tensor], tensors: Tensors, d_y: Tensor) -> dict[str, Tensor]:
    """As ``outputs_and_gradients``, but the gradient of the output is given, and reaches the op with the strides it has."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items() if tensor is not None}
    output = op(**{name: leaves.get(name) for name in tensors})
    gradients = torch.autograd.grad(output, list(leaves.values()), d_y)
    return {"output": output.detach(), **{f"d_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}}


def no_token_reads_across_a_row_start(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Undefined values in every second row of x, or of the gradient of the output, change nothing in the others."""
    tensors, layout = subject.inputs(lengths, seed)
    x, d_y = tensors["x"], _output_gradient(subject, layout, seed)
    assert x is not None
    is_odd = (layout.rows % 2 == 1)[:, None]
    kept = (layout.rows % 2 == 0).nonzero()[:, 0]
    before = _results(subject.call(layout), tensors, d_y)
    for values, gradient in ((x.detach().masked_fill(is_odd, torch.nan), d_y), (x, d_y.masked_fill(is_odd, torch.nan))):
        after = _results(subject.call(layout), {**tensors, "x": values}, gradient)
        for name in ("output", "d_x"):
            _assert_same(subject, after[name][kept], before[name][kept], name)


def strided_views_equal_contiguous_inputs(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Tokens of a wider and longer tensor are read in place, and nothing around them; a gradient with any strides is accepted."""
    tensors, layout = subject.inputs(lengths, seed)
    x, d_y = tensors["x"], _output_gradient(subject, layout, seed)
    assert x is not None
    expected = _results(subject.call(layout), tensors, d_y)
    # two strides: one must not pass for the other
    amid_undefined = _amid_undefined(x, subject.dim), _amid_undefined(d_y, 2 * subject.dim)
    for x_view, d_y_view in (amid_undefined, (_channels_first(x), _channels_first(d_y))):
        actual = _results(subject.call(layout), {**tensors, "x": x_view}, d_y_view)
        for name, value in expected.items():
            _assert_same(subject, actual[name], value, name)
    one_value = torch.ones((), dtype=subject.dtype, device=subject.device)
    expanded = _results(subject.call(layout), tensors, one_value.expand(x.shape))
    for name, value in _results(subject.call(layout), tensors, torch.ones_like(x)).items():
        _assert_same(subject, expanded[name], value, f"{name} of an expanded gradient")


def _amid_undefined(tokens: Tensor, width: int) -> Tensor:
    """The same values, between others that are NaN: ``width`` channels to the left and right of each token, 16 tokens before and after."""
    length, dim = tokens.shape
    around = tokens.new_full((16 + length + 16, width + dim + width), torch.nan)
    view = around[16 : 16 + length, width : width + dim]
    view.copy_(tokens.detach())
    return view


def _channels_first(tokens: Tensor) -> Tensor:
    """The same values, those of a channel side by side."""
    return tokens.detach().T.contiguous().T


def layout_is_optional(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Offsets alone give the same bits."""
    tensors, layout = subject.inputs(lengths, seed)
    expected = outputs_and_gradients(subject.call(layout), tensors, seed)
    actual = outputs_and_gradients(subject.call(layout, layout=None), tensors, seed)
    for name, value in expected.items():
        _assert_same(subject, actual[name], value, name)


def same_call_gives_the_same_bits(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Sums have a fixed order."""
    tensors, layout = subject.inputs(lengths, seed)
    first, second = (outputs_and_gradients(subject.call(layout), tensors, seed) for _ in range(2))
    for name, value in first.items():
        _assert_same(subject, second[name], value, name)


def gradients_have_the_dtypes_of_their_tensors(subject: ConvSubject, lengths: Sequence[int], seed: int) -> None:
    """Also where parameters are wider than x; without tokens they are zero, not None."""
    tensors, layout = subject.inputs(lengths, seed)
    results = outputs_and_gradients(subject.call(layout), tensors, seed)
    for name, tensor in tensors.items():
        if tensor is not None:
            assert results[f"d_{name}"].dtype == tensor.dtype and results[f"d_{name}"].shape == tensor.shape, name
    assert results["output"].dtype == subject.dtype
    tensors, layout = subject.inputs([0, 0], seed)
    for name, value in outputs_and_gradients(subject.call(layout), tensors, seed).items():
        assert torch.equal(value, torch.zeros_like(value)), name


LAWS: tuple[Law, ...] = (
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    no_token_reads_across_a_row_start,
    strided_views_equal_contiguous_inputs,
    layout_is_optional,
    same_call_gives_the_same_bits,
    gradients_have_the_dtypes_of_their_tensors,
)
