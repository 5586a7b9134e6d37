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
    opcheck(torch.ops.gbla_kernels.gated_linear_attention.default, (*leaves, *layout.row_splits.tensors(), *OPTIONS))


@cases
def test_opcheck_of_backward(lengths: list[int], absent: tuple[str, ...]) -> None:
    inputs, layout = inputs_of(lengths, absent)
    tables = layout.row_splits.tensors()
    output, *states = torch.ops.gbla_kernels.gated_linear_attention(*inputs.values(), *tables, *OPTIONS)
    arguments = (output_weights(output), *inputs.values(), *states, *tables, *OPTIONS)
    opcheck(torch.ops.gbla_kernels.gated_linear_attention_backward.default, arguments)


@pytest.mark.parametrize("absent", [(), ("key_gate", "output_gate"), ("norm_weight",)], ids=["full", "no_gates", "no_norm"])
def test_traced_call_equals_the_eager_one(absent: tuple[str, ...]) -> None:
    inputs, layout = inputs_of([0, 3, SPLIT + 1, 17], absent)

    def run(**tensors: Tensor | None) -> Tensor:
        return attend(**tensors, splits=layout.row_splits, feature_map="elu1", normalize=True, eps=1e-6)  # type: ignore[arg-type]

    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_bits(results(compiled, inputs), results(run, inputs))
