"""Under torch.compile, torch.export and AOTInductor the op gives what it gives in eager mode."""

import subprocess
import sys
from pathlib import Path
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


LOAD_AND_RUN = """
import sys
import torch
import torch._inductor

package, batches, outputs = sys.argv[1:]
# on the device first: the loader counts on a process that has begun to use CUDA
batches = [[x.cuda() for x in batch] for batch in torch.load(batches)]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*batch).cpu() for batch in batches], outputs)
assert not [name for name in sys.modules if name.partition(".")[0]  == "gbla_kernels"], "the package needs no kernels"
"""


class Double(nn.Module):
    """No kernel of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def in_fresh_process(package: str, batches: list[list[Tensor]], directory: Path) -> subprocess.CompletedProcess[str]:
    torch.save(batches, directory / "batches.pt")
    command = [sys.executable, "-c", LOAD_AND_RUN, package, str(directory / "batches.pt"), str(directory / "outputs.pt")]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


def packaged(program: torch.export.ExportedProgram, path: Path) -> str:
    # a header that is compiled ahead pays from many packages on
    options = {"aot_inductor.precompile_headers": False}
    return str(torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options))


# g++ compiles each package for minutes on some machines
@pytest.mark.timeout(480)
def test_aot_inductor_package_runs_where_the_kernels_are_not_imported(tmp_path: Path) -> None:
    package = packaged(torch.export.export(Double(), (torch.ones(4, device="cuda"),)), tmp_path / "control.pt2")
    # so it does where CXX is a g++ that links its own libstdc++ into the package
    if in_fresh_process(package, [[torch.ones(4)]], tmp_path).returncode < 0:
        pytest.skip("here torch crashes on loading any AOTInductor package in a fresh process")
    module = Attention().requires_grad_(False)
    package = packaged(exported(module, LARGE_BATCHES[0]), tmp_path / "attention.pt2")
    batches, expected = [], []
    for lengths in LARGE_BATCHES:
        inputs, layout = BF16.inputs(lengths, seed=1)
        arguments = [*(inputs[name] for name in NAMES), layout.offsets]
        batches.append([x.cpu() for x in arguments])
        expected.append(module(*arguments).cpu())
    finished = in_fresh_process(package, batches, tmp_path)
    assert finished.returncode == 0, finished.stderr[-4000:]
    for output, value in zip(torch.load(tmp_path / "outputs.pt"), expected, strict=True):
        assert torch.equal(output, value)
