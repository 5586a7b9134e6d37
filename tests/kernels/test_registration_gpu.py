"""Compiled, replayed, exported and packaged, the ops give what they give in eager mode.

``gated_linear_attention`` is held to this in its own folder, and so are the convolutions under torch.compile and CUDA graphs. Where
there is no GPU the interpreter runs what needs none: torch.compile without its code generator, and torch.export.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, ExportedProgram

from gbla_kernels import (
    Backend,
    JaggedLayout,
    causal_conv1d,
    gated_linear_attention_packed,
    jagged_cross_attention_packed,
    keyed_dropout,
    rms_norm_causal_conv1d,
    rotary_embedding,
)
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.testing.attention_subject import FLOOR, Subject, Tensors, assert_within, output_weights, results
from gbla_kernels.testing.conv_laws import ConvSubject
from gbla_kernels.testing.cross_attention_inputs import CrossAttention
from gbla_kernels.testing.cuda_graph import assert_replays

# where kernels are compiled, "-m gpu" runs all of these
pytestmark = [] if INTERPRETED else pytest.mark.gpu

# the interpreter computes bf16 wrongly
DTYPE, DEVICE = (torch.float32, "cpu") if INTERPRETED else (torch.bfloat16, "cuda")
SETTINGS: dict[str, Any] = {"backend": Backend.TRITON, "dtype": DTYPE, "device": DEVICE}
WIDTHS = {"num_heads": 2, "key_dim": 32, "value_dim": 32}

ATTENTION = Subject(**SETTINGS, **WIDTHS)
CROSS_ATTENTION = CrossAttention(**SETTINGS, **WIDTHS)
LENGTHS = ([3, 515], [0, 400, 380], [90, 1, 60, 7, 0])
"""Short rows and split ones; in the last, rows are more than splits can be: without a layout the other bound of the tables holds."""
ROWS = ([(2, 600), (140, 40), (0, 3)], [(130, 7), (1, 530), (2, 0), (1, 1)], [(131, 513), (3, 9)])
"""All launch every kernel of cross-attention. The longest rows come first: an exported program has room for those of its example."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An op, and batches of its arguments: tensors that want gradients, and tensors or layouts that do not."""

    op: Callable[..., Tensor]
    make: Callable[[Any, int], tuple[Tensors, dict[str, Any]]]
    batches: Sequence[Any] = LENGTHS
    has_float: bool = False

    def __call__(self, **arguments: Any) -> Tensor:
        """The op before something that a compiler fuses."""
        return self.op(**arguments, backend=Backend.TRITON) * 2

    def given(self, batch: Any, seed: int) -> dict[str, Any]:
        tensors, rows = self.make(batch, seed)
        return {**tensors, **rows}


def packed_inputs(lengths: list[int], seed: int, *, has_layout: bool) -> tuple[Tensors, dict[str, Any]]:
    inputs, layout = ATTENTION.inputs(lengths, seed)
    columns = [inputs[name].flatten(1) for name in ("query", "key", "value", "output_gate", "key_gate")]
    rows = {"offsets": layout.offsets, **({"layout": layout} if has_layout else {})}
    return {"projection": torch.cat(columns, dim=1), "norm_weight": inputs["norm_weight"]}, rows


def conv_inputs(lengths: list[int], seed: int, *, op: Callable[..., Tensor], has_norm: bool) -> tuple[Tensors, dict[str, Any]]:
    tensors, layout = ConvSubject(**SETTINGS, op=op, has_norm=has_norm, parameter_dtype=torch.float32).inputs(lengths, seed)
    return {name: x.detach() for name, x in tensors.items() if x is not None}, {"offsets": layout.offsets}


def cross_attention_inputs(rows: list[tuple[int, int]], seed: int) -> tuple[Tensors, dict[str, Any]]:
    inputs, (queries, keys) = CROSS_ATTENTION.inputs(rows, seed), CROSS_ATTENTION.layouts(rows)
    key_value = torch.stack((inputs["key"], inputs["value"]), dim=1)
    return {"query": inputs["query"], "key_value": key_value}, {"query_layout": queries, "key_layout": keys}


def rotary_inputs(lengths: list[int], seed: int) -> tuple[Tensors, dict[str, Any]]:
    inputs, layout = ATTENTION.inputs(lengths, seed)
    return {name: inputs[name] for name in ("query", "key")}, {"positions": layout.positions}


def dropout_inputs(lengths: list[int], seed: int) -> tuple[Tensors, dict[str, Any]]:
    inputs, layout = ATTENTION.inputs(lengths, seed)
    token_keys = layout.rows * 2**40 + layout.positions * 7919
    return {"x": inputs["query"].flatten(1), "residual": inputs["key"].flatten(1)}, {"token_keys": token_keys}


def turned(**arguments: Any) -> Tensor:
    return torch.stack(rotary_embedding(**arguments))


packed = partial(gated_linear_attention_packed, **WIDTHS)
PACKED = pytest.param(Case(op=packed, make=partial(packed_inputs, has_layout=False)), id="linear_attention_packed")
PACKED_LAYOUT = pytest.param(Case(op=packed, make=partial(packed_inputs, has_layout=True)), id="linear_attention_packed_layout")
CROSS = pytest.param(Case(op=jagged_cross_attention_packed, make=cross_attention_inputs, batches=ROWS), id="cross_attention_packed")
ROTARY = pytest.param(Case(op=turned, make=rotary_inputs), id="rotary")
# a scale of two: no rounding between product and sum that a compiler may leave out
DROPOUT = pytest.param(Case(op=partial(keyed_dropout, probability=0.5, salt=3), make=dropout_inputs, has_float=True), id="keyed_dropout")
CONVS = [
    pytest.param(Case(op=op, make=partial(conv_inputs, op=op, has_norm=has_norm)), id=op.__name__)
    for op, has_norm in ((causal_conv1d, False), (rms_norm_causal_conv1d, True))
]
without_convs = pytest.mark.parametrize("case", [PACKED_LAYOUT, PACKED, CROSS, ROTARY, DROPOUT])
each_op = pytest.mark.parametrize("case", [PACKED, CROSS, ROTARY, DROPOUT, *CONVS])


@without_convs
def test_compiled_equals_eager_and_compiles_nothing_for_later_batches(case: Case) -> None:
    torch._dynamo.reset()
    compilations = []
    counter = CompileCounterWithBackend("aot_eager" if INTERPRETED else "inductor")
    compiled = torch.compile(case, backend=counter, fullgraph=True, dynamic=True)
    # a graph that comes from a cache of the compiler has one guard more where there is no layout
    with torch._inductor.config.patch(force_disable_caches=True):
        for batch in case.batches:
            tensors, rows = case.make(batch, 0)
            actual, expected = (results(partial(op, **rows), tensors) for op in (compiled, case))
            # bit for bit, but for the sum over rows in the gradient of norm_weight, which the compiler may reorder
            budget = {name: 2 * FLOOR[x.dtype] if name == "d_norm_weight" else 0.0 for name, x in expected.items()}
            assert_within(actual, expected, budget)
            compilations.append(counter.frame_count)
    # a float that is given, as the probability of dropout, is taken for an input first (torch 2.11)
    assert compilations[-1] == compilations[0] <= (2 if case.has_float else 1), compilations


@pytest.mark.gpu
@without_convs
def test_cuda_graph_replays_forward_and_backward(case: Case) -> None:
    first, rows = case.make(case.batches[0], 0)
    second, _ = case.make(case.batches[0], 1)
    op = partial(case, **rows)
    d_output = output_weights(op(**first)).to(DTYPE)
    assert_replays(lambda tensors: results(op, tensors, d_output), first, second)


class Program(nn.Module):
    """A case as a function of tensors alone, which a program can take: a layout is taken apart and put together inside."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.example = case.given(case.batches[0], 0)

    def forward(self, *arguments: Tensor) -> Tensor:
        rest = iter(arguments)
        given = {name: x._map(lambda _: next(rest)) if isinstance(x, JaggedLayout) else next(rest) for name, x in self.example.items()}
        return self.case(**given)

    def arguments(self, batch: Any, seed: int) -> list[Tensor]:
        return [x for given in self.case.given(batch, seed).values() for x in _tensors_of(given)]

    def exported(self) -> ExportedProgram:
        is_parameter = [name in ("norm_weight", "weight", "bias") for name, x in self.example.items() for _ in _tensors_of(x)]
        shapes = tuple({} if is_fixed else {0: Dim.AUTO} for is_fixed in is_parameter)
        return torch.export.export(self, tuple(self.arguments(self.case.batches[0], 0)), dynamic_shapes=(shapes,))


def _tensors_of(x: Tensor | JaggedLayout) -> tuple[Tensor, ...]:
    return x._device_tensors() if isinstance(x, JaggedLayout) else (x,)


@each_op
def test_exported_program_equals_eager(case: Case) -> None:
    program = Program(case)
    run = program.exported().module()
    for batch in case.batches:
        assert torch.equal(run(*program.arguments(batch, 1)), case(**case.given(batch, 1)))


# g++ compiles each package for minutes on some machines
@pytest.mark.gpu
@pytest.mark.timeout(480)
@each_op
def test_aot_inductor_package_runs_where_the_kernels_are_not_imported(case: Case, run_packaged: Callable[..., list[Tensor]]) -> None:
    program = Program(case)
    outputs = run_packaged(program.exported(), [program.arguments(batch, 1) for batch in case.batches])
    for output, batch in zip(outputs, case.batches, strict=True):
        assert torch.equal(output, case(**case.given(batch, 1)).cpu())
