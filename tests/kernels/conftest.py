"""Jagged batches for hypothesis, memory that shows what a kernel leaves unwritten, and a process that compiles kernels."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import strategies as st

from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.inputs import BLOCK, JaggedLengths

EDGES = tuple(block + step for block in (16, BLOCK, 2 * BLOCK) for step in (-1, 0, 1))
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
