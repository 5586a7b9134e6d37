"""The registered ops keep torch.library's contract, and traced calls give what eager calls give."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention.autograd import attend
from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.attention_subject import Subject, Tensors, assert_same_bits, output_weights, results

TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, device="cpu" if INTERPRETED else "cuda")
ORDER = ("query", "key", "value", "key_gate", "output_gate", "norm_weight")
OPTIONS = (False, True, 1e-6)
"""ReLU, division, eps; a forward takes besides whether a backward comes."""
BARE = ("key_gate", "output_gate", "norm_weight")
cases = pytest.mark.parametrize(
    ("lengths", "absent"), [([0, 3, 17], ()), ([2, SPLIT + 1], ()), ([2, SPLIT + 1], BARE)], ids=["short", "split", "bare"]
)


def inputs_of(lengths: list[int], absent: tuple[str, ...] = ()) -> tuple[Tensors, JaggedLayout]:
    inputs, layout = TRITON.inputs(lengths, seed=0)
    return {name: None if name in absent else inputs[name] for name in ORDER}, layout


@cases
def test_opcheck_of_forward(lengths: list[int], absent: tuple[str, ...]) -> None:
    inputs, layout = inputs_of(lengths, absent)
    leaves = [x if x is None else x.requires_grad_() for x in inputs.values()]
    opcheck(torch.ops.gbla_kernels.gated_linear_attention.default, (*leaves, *layout.row_splits.tensors(), *OPTIONS, True))


@cases
def test_opcheck_of_backward(lengths: list[int], absent: tuple[str, ...]) -> None:
    inputs, layout = inputs_of(lengths, absent)
    tables = layout.row_splits.tensors()
    output, *states = torch.ops.gbla_kernels.gated_linear_attention(*inputs.values(), *tables, *OPTIONS, True)
    arguments = (output_weights(output), *inputs.values(), *states, *tables, *OPTIONS)
    opcheck(torch.ops.gbla_kernels.gated_linear_attention_backward.default, arguments)


@pytest.mark.parametrize("lengths", [[0, 3, 17], [2, SPLIT + 1]], ids=["short", "split"])
@pytest.mark.parametrize("has_gates", [True, False], ids=["gates", "no_gates"])
def test_opcheck_of_one_projection(lengths: list[int], has_gates: bool) -> None:
    layout, heads, width = JaggedLayout.from_lengths(lengths).to(TRITON.device), 2, 16
    columns = heads * (4 * width + 1) if has_gates else heads * 3 * width
    projection = torch.randn(layout.num_tokens, columns + 2, device=TRITON.device)
    norm_weight = torch.randn(heads, width, device=TRITON.device)
    tables = layout.row_splits.tensors()
    options = (heads, width, width, has_gates, has_gates, *OPTIONS)
    leaves = [x.clone().requires_grad_() for x in (projection, norm_weight)]
    opcheck(torch.ops.gbla_kernels.gated_linear_attention_packed.default, (*leaves, *tables, *options, True))
    output, *states = torch.ops.gbla_kernels.gated_linear_attention_packed(projection, norm_weight, *tables, *options, True)
    arguments = (output_weights(output), projection, norm_weight, *states, *tables, *options)
    opcheck(torch.ops.gbla_kernels.gated_linear_attention_packed_backward.default, arguments)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_opcheck_of_the_reference(direction: str) -> None:
    inputs, layout = inputs_of([0, 3, 17])
    settings = (layout.offsets_cpu, "elu1", True, 1e-6, direction)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    opcheck(torch.ops.gbla_kernels.linear_attention_reference.default, (*leaves, *settings))


@pytest.mark.parametrize("absent", [(), ("key_gate", "output_gate"), ("norm_weight",)], ids=["full", "no_gates", "no_norm"])
def test_traced_call_equals_the_eager_one(absent: tuple[str, ...]) -> None:
    inputs, layout = inputs_of([0, 3, SPLIT + 1, 17], absent)

    def run(**tensors: Tensor | None) -> Tensor:
        return attend(**tensors, splits=layout.row_splits, feature_map="elu1", normalize=True, eps=1e-6)  # type: ignore[arg-type]

    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_bits(results(compiled, inputs), results(run, inputs))
