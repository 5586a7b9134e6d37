"""The registered ops keep torch.library's contract, and traced calls give what eager calls give."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention, gated_linear_attention_packed
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention import autograd
from gbla_kernels.linear_attention.autograd import attend
from gbla_kernels.linear_attention.launches import run_forward
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT
from gbla_kernels.testing.attention_subject import Subject, Tensors, assert_same_bits, output_weights, results

# where kernels are compiled, "-m gpu" runs these too
pytestmark = [] if INTERPRETED else pytest.mark.gpu

TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, device="cpu" if INTERPRETED else "cuda")
ORDER = ("query", "key", "value", "key_gate", "output_gate", "norm_weight")
OPTIONS = (False, True, 1e-6)
"""ReLU, division, eps; a forward takes besides whether a backward comes."""
BARE = ("key_gate", "output_gate", "norm_weight")
cases = pytest.mark.parametrize(
    ("lengths", "absent"),
    [([0, 3, 17], ()), ([2, SHORT_LIMIT + 1, SPLIT + 1], ()), ([2, SHORT_LIMIT + 1, SPLIT + 1], BARE)],
    ids=["short", "split", "bare"],
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


@pytest.mark.parametrize("lengths", [[0, 3, 17], [2, SHORT_LIMIT + 1, SPLIT + 1]], ids=["short", "split"])
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


@pytest.mark.parametrize("is_packed", [False, True], ids=["tensors", "packed"])
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_states_are_made_for_a_backward_exactly_where_one_can_come(
    monkeypatch: pytest.MonkeyPatch, is_packed: bool, is_compiled: bool
) -> None:
    made = []

    def spying_forward(run: Any, x: Any, norm_weight: Any, work: Any) -> Any:
        made.append(work.for_backward)
        return run_forward(run, x, norm_weight, work)

    monkeypatch.setattr(autograd, "run_forward", spying_forward)
    inputs, layout = inputs_of([0, 3, SPLIT + 1])
    projection = torch.cat([inputs[name].flatten(1) for name in ("query", "key", "query", "query", "key_gate")], dim=1)
    weight = torch.ones(TRITON.num_heads, TRITON.key_dim, device=TRITON.device)
    packed = {"projection": projection, "norm_weight": weight}
    dims = {"num_heads": TRITON.num_heads, "key_dim": TRITON.key_dim, "value_dim": TRITON.key_dim}

    def attend_all(**tensors: Tensor) -> Tensor:
        options: Any = {"offsets": layout.offsets, "layout": layout, "backend": Backend.TRITON}
        return gated_linear_attention_packed(**tensors, **dims, **options) if is_packed else gated_linear_attention(**tensors, **options)

    op = torch.compile(attend_all, backend="aot_eager", fullgraph=True) if is_compiled else attend_all
    tensors = {name: x.detach() for name, x in (packed if is_packed else inputs).items()}
    for leaves in ((), tuple(tensors), ("norm_weight",)):
        given = {name: x.clone().requires_grad_(name in leaves) for name, x in tensors.items()}
        for is_recording in (True, False):
            made.clear()
            # each case is another graph
            torch.compiler.reset()
            with torch.set_grad_enabled(is_recording):
                op(**given)
            assert made and set(made) == {is_recording and bool(leaves)}, (leaves, is_recording)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_opcheck_of_the_reference(direction: str) -> None:
    inputs, layout = inputs_of([0, 3, 17])
    settings = (layout.offsets_cpu, "elu1", True, 1e-6, direction)
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    opcheck(torch.ops.gbla_kernels.linear_attention_reference.default, (*leaves, *settings))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("absent", [(), ("key_gate", "output_gate"), ("norm_weight",)], ids=["full", "no_gates", "no_norm"])
def test_traced_call_equals_the_eager_one(absent: tuple[str, ...]) -> None:
    # rows of no split, one and two
    inputs, layout = inputs_of([0, 3, SPLIT + 1, SHORT_LIMIT, 17, SHORT_LIMIT + 1], absent)

    def run(**tensors: Tensor | None) -> Tensor:
        return attend(**tensors, splits=layout.row_splits, feature_map="elu1", normalize=True, eps=1e-6)  # type: ignore[arg-type]

    compiled: Any = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=True)
    assert_same_bits(results(compiled, inputs), results(run, inputs))
