"""The reference as a registered op: compilers see one call, where tracing it would unroll the rows into a graph for each batch."""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

from typing import Any

import torch
from torch import Tensor

from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.reference import gated_linear_attention_reference


def reference_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    offsets_cpu: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> Tensor:
    """See ``gated_linear_attention_reference``; ``offsets_cpu`` is ``(B + 1,)`` int64 on the CPU."""
    tensors = (query, key, value, key_gate, output_gate, norm_weight)
    return _forward(*tensors, offsets_cpu, feature_map, normalize, eps, direction)  # type: ignore[no-any-return]


@torch.library.custom_op("gbla_kernels::linear_attention_reference", mutates_args=())
def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    offsets_cpu: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> Tensor:
    layout = JaggedLayout.from_offsets(offsets_cpu).to(query.device)
    tensors = (query, key, value, key_gate, output_gate, norm_weight)
    return gated_linear_attention_reference(*tensors, layout.offsets, layout, feature_map, normalize, eps, direction)


@_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return value.new_empty(value.shape)


@torch.library.custom_op("gbla_kernels::linear_attention_reference_backward", mutates_args=())
def _backward(
    d_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    offsets_cpu: Tensor,
    feature_map: str,
    normalize: bool,
    eps: float,
    direction: str,
) -> list[Tensor]:
    """The gradients of the tensors that are given, in order."""
    layout = JaggedLayout.from_offsets(offsets_cpu).to(query.device)
    tensors = (query, key, value, key_gate, output_gate, norm_weight)

    def attend(*present: Tensor) -> Tensor:
        given = iter(present)
        operands: list[Any] = [None if tensor is None else next(given) for tensor in tensors]
        operands += [layout.offsets, layout, feature_map, normalize, eps, direction]
        return gated_linear_attention_reference(*operands)

    # vjp records its own graph: autograd is off inside an op
    pull_back = torch.func.vjp(attend, *(tensor for tensor in tensors if tensor is not None))[1]
    return [gradient.contiguous() for gradient in pull_back(d_output)]


@_backward.register_fake
def _(d_output: Tensor, *arguments: Any) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in arguments[:6] if tensor is not None]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.settings = inputs[7:]


def _registered_backward(ctx: Any, d_output: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    given = iter(_backward(d_output, *tensors, *ctx.settings))
    return (*(None if tensor is None else next(given) for tensor in tensors[:6]), *(None,) * 5)


_forward.register_autograd(_registered_backward, setup_context=_save_inputs)
