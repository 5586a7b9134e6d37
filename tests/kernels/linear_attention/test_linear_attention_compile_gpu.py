"""Under torch.compile, torch.export and AOTInductor the op gives what it gives in eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.attention_subject import FLOOR, Results, Subject, output_weights, results
from gbla_kernels.testing.error_budget import relative_error

pytestmark = pytest.mark.gpu

BF16 = Subject(backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", num_heads=2, key_dim=64, value_dim=64)
BATCHES = [
    [5, 700, 3 * SPLIT, 2],
    [70, 2000, 0, 900, SPLIT + 1, 64, 1],
    [3, 4, 4000, 600],
    [31, 33, SPLIT + 9, 1200, 2, 0, 0, 2500],
    [2000],
    [3, 5000],
    [40, 9, 17],
    [SPLIT, 0],
]
"""Their numbers of short and split rows differ, none and one among them."""
LARGE_BATCHES = BATCHES[:4]
"""Of more than one row and 1024 tokens."""
TINY_BATCHES = [[1], [0, 2], [SPLIT + 1], [16] * 5]
NAMES = ("query", "key", "value", "key_gate", "output_gate")


class Attention(nn.Module):
    """The op with its parameter, after and before something that the compiler fuses."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm_weight = nn.Parameter(torch.randn(2, 64, generator=generator).to("cuda", torch.bfloat16))

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_gate: Tensor,
        output_gate: Tensor,
        offsets: Tensor,
        layout: JaggedLayout | None = None,
    ) -> Tensor:
        output = gated_linear_attention(
            *(query, key, value, key_gate, output_gate, self.norm_weight, offsets), layout=layout, backend=Backend.TRITON
        )
        return output.flatten(1) * 2


def run(module: Any, lengths: list[int], has_layout: bool) -> Results:
    inputs, layout = BF16.inputs(lengths, seed=len(lengths))
    tensors = {name: inputs[name] for name in NAMES}
    d_output = output_weights(inputs["value"]).flatten(1)
    extra = {"offsets": layout.offsets, "layout": layout if has_layout else None}
    outcome = results(lambda **leaves: module(**leaves, **extra), tensors, d_output)
    parameter = module.norm_weight
    output = module(**tensors, **extra)
    (d_weight,) = torch.autograd.grad(output, [parameter], d_output.to(output.dtype))
    return {**outcome, "d_norm_weight": d_weight}


def assert_same(actual: Results, expected: Results) -> None:
    """Bit for bit, but for the sum over rows in the gradient of norm_weight, which the compiler may reorder."""
    for name, value in expected.items():
        if name == "d_norm_weight":
            assert relative_error(actual[name], value) <= 2 * FLOOR[value.dtype], name
        else:
            assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])
def test_compiled_equals_eager_and_compiles_at_most_twice(has_layout: bool) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    module = Attention()
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=True)
    # gradients of inputs, and of the parameter alone, are two graphs; a graph that comes from a cache of the compiler has one guard
    # more where there is no layout: whether rows or tokens bound the tables, since Python evaluates its min()
    with torch._inductor.config.patch(force_disable_caches=True):
        for lengths in BATCHES:
            assert_same(run(compiled, lengths, has_layout), run(module, lengths, has_layout))
    assert counter.frame_count <= 2, f"{counter.frame_count} compilations for {len(BATCHES)} batches"


@pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])
def test_compiled_equals_eager_where_sizes_are_zero_or_one(has_layout: bool) -> None:
    torch._dynamo.reset()
    module = Attention()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    for lengths in TINY_BATCHES:
        assert_same(run(compiled, lengths, has_layout), run(module, lengths, has_layout))


def exported(module: nn.Module, lengths: list[int]) -> torch.export.ExportedProgram:
    inputs, layout = BF16.inputs(lengths, seed=0)
    tokens, bounds = {0: Dim("L", min=1024, max=2**22)}, {0: Dim("num_offsets", min=3, max=2**16)}
    arguments = tuple(inputs[name] for name in NAMES)
    shapes = (*(tokens for _ in NAMES), bounds)
    return torch.export.export(module, (*arguments, layout.offsets), dynamic_shapes=shapes)


def test_exported_program_equals_eager() -> None:
    module = Attention().requires_grad_(False)
    program = exported(module, LARGE_BATCHES[0]).module()
    for lengths in LARGE_BATCHES:
        inputs, layout = BF16.inputs(lengths, seed=1)
        arguments = [inputs[name] for name in NAMES]
        assert torch.equal(program(*arguments, layout.offsets), module(*arguments, layout.offsets))


# g++ compiles each package for minutes on some machines
@pytest.mark.timeout(480)
def test_aot_inductor_package_runs_where_the_kernels_are_not_imported(run_packaged: Callable[..., list[Tensor]]) -> None:
    module = Attention().requires_grad_(False)
    program = exported(module, LARGE_BATCHES[0])
    batches = []
    for lengths in LARGE_BATCHES:
        inputs, layout = BF16.inputs(lengths, seed=1)
        batches.append([*(inputs[name] for name in NAMES), layout.offsets])
    for output, batch in zip(run_packaged(program, batches), batches, strict=True):
        assert torch.equal(output, module(*batch).cpu())
