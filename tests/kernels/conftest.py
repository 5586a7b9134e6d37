"""Jagged batches for hypothesis, memory that shows what a kernel leaves unwritten, and processes that compile or import no kernels."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.export import ExportedProgram

from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT
from gbla_kernels.testing.inputs import BLOCK, JaggedLengths

EDGES = tuple(block + step for block in (16, BLOCK, SHORT_LIMIT) for step in (-1, 0, 1))
PRIMES = (2, 3, 5, 7, 31, 61, 67, 131)
GIANTS = (SPLIT - 1, SPLIT, SPLIT + 1)


@st.composite
def one_giant_among_tiny_rows(draw: st.DrawFn) -> list[int]:
    tiny = draw(st.lists(st.integers(0, 3), min_size=2, max_size=6))
    return draw(st.permutations([*tiny, draw(st.sampled_from(GIANTS))]))


nasty_rows = st.lists(st.sampled_from((0, 1, *EDGES, *PRIMES)) | st.integers(0, 90), min_size=1, max_size=5)
st.register_type_strategy(JaggedLengths, nasty_rows | one_giant_among_tiny_rows())


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """What ``torch.empty`` returns is NaN, or the largest integer, during this test."""
    mode, is_warning = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    # warnings only: cuBLAS would ask for an environment variable
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=is_warning)
        torch.utils.deterministic.fill_uninitialized_memory = fills


@pytest.fixture
def run_without_interpreter() -> Callable[[str], str]:
    """Runs a program in a process of its own, whose kernels a compiler can see, and returns what it printed."""

    def run(program: str) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        finished = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=150)
        assert finished.returncode == 0, finished.stderr[-4000:]
        return finished.stdout

    return run


LOAD_AND_RUN = """
import sys
import torch
import torch._inductor

package, batches, outputs, device = sys.argv[1:]
# on the device first: the loader counts on a process that has begun to use CUDA
batches = [[x.to(device) for x in batch] for batch in torch.load(batches)]
model = torch._inductor.aoti_load_package(package)
torch.save([model(*batch).cpu() for batch in batches], outputs)
assert not [name for name in sys.modules if name.partition(".")[0] == "gbla_kernels"], "the package needs no kernels"
"""


class Double(nn.Module):
    """No kernel of ours."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def packaged(program: ExportedProgram, path: Path) -> str:
    # a header that is compiled ahead pays from many packages on
    options = {"aot_inductor.precompile_headers": False}
    return str(torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options))


def in_fresh_process(package: str, batches: list[list[Tensor]], directory: Path) -> subprocess.CompletedProcess[str]:
    device, on_cpu = batches[0][0].device.type, [[x.cpu() for x in batch] for batch in batches]
    torch.save(on_cpu, directory / "batches.pt")
    arguments = [package, *(str(directory / name) for name in ("batches.pt", "outputs.pt")), device]
    return subprocess.run([sys.executable, "-c", LOAD_AND_RUN, *arguments], cwd=directory, capture_output=True, text=True)


@pytest.fixture(scope="session")
def has_loadable_packages(tmp_path_factory: pytest.TempPathFactory) -> bool:
    """The control: whether a package without our kernels runs in a fresh process.

    It does not where ``CXX`` is a g++ that links a libstdc++ of its own into it (as ``-static-libstdc++``; ``readelf -d`` of the package's
    ``.so`` then names none): the process crashes, or the loader says that an API call failed.
    """
    directory, ones = tmp_path_factory.mktemp("control"), torch.ones(4, device="cuda" if torch.cuda.is_available() else "cpu")
    package = packaged(torch.export.export(Double(), (ones,)), directory / "control.pt2")
    finished = in_fresh_process(package, [[ones]], directory)
    return finished.returncode >= 0 and "API call failed" not in finished.stderr


@pytest.fixture
def run_packaged(has_loadable_packages: bool, tmp_path: Path) -> Callable[[ExportedProgram, list[list[Tensor]]], list[Tensor]]:
    """Compiles a program with AOTInductor, runs it on batches in a process that imports no kernels, and returns its outputs on the CPU."""
    if not has_loadable_packages:
        pytest.skip("here torch loads no AOTInductor package in a fresh process; set CXX to a g++ that links libstdc++.so")

    def run(program: ExportedProgram, batches: list[list[Tensor]]) -> list[Tensor]:
        finished = in_fresh_process(packaged(program, tmp_path / "program.pt2"), batches, tmp_path)
        assert finished.returncode == 0, finished.stderr[-4000:]
        return list(torch.load(tmp_path / "outputs.pt"))

    return run
