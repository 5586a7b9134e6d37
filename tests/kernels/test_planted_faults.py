"""A test of the tests: the laws notice three classic mistakes, each planted into a copy of the kernels."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import gbla_kernels

CHECK = """
import sys
import torch
import gbla_kernels
from gbla_kernels import Backend, causal_conv1d
from gbla_kernels.testing import attention_laws, conv_laws
from gbla_kernels.testing.attention_subject import Subject
from gbla_kernels.testing.conv_laws import ConvSubject

assert gbla_kernels.__file__.startswith(sys.argv[1]), gbla_kernels.__file__
attention = Subject(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
conv = ConvSubject(op=causal_conv1d, backend=Backend.TRITON, dtype=torch.float32)
cases = {
    "attention": (attention, attention_laws, ("packed_batch_is_each_row_alone_bit_for_bit", "gates_far_apart_neither_overflow_nor_vanish")),
    "conv": (conv, conv_laws, ("packed_batch_is_each_row_alone_bit_for_bit",)),
}
for op in sys.argv[2:]:
    subject, laws, names = cases[op]
    for name in names:
        getattr(laws, name)(subject, [5, 70, 0, 3], 0)
print("every law holds")
"""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """``text``, which must occur once in ``file`` of the package, becomes ``mistake``."""

    op: str
    file: str
    text: str
    mistake: str


FAULTS = {
    "no_mask_at_the_row_end": Fault(
        op="attention",
        file="linear_attention/state.py",
        text='return tl.load(p_gate + o_t * stride_gt, mask=o_t < num_tokens, other=float("-inf")).to(tl.float32)',
        mistake="return tl.load(p_gate + o_t * stride_gt).to(tl.float32)",
    ),
    "no_maximum_subtracted": Fault(
        op="attention",
        file="linear_attention/state.py",
        text="log_weight = (gate - safe_max) * LOG2E",
        mistake="log_weight = gate * LOG2E",
    ),
    "halo_reaches_one_token_too_far": Fault(
        op="conv",
        file="causal_conv1d/forward.py",
        text="tl.where(position[:, None] >= distance, value, 0)",
        mistake="tl.where(position[:, None] >= distance - 1, value, 0)",
    ),
}


def laws_hold(directory: Path, *ops: str) -> subprocess.CompletedProcess[str]:
    """Run ``CHECK`` on the package in ``directory``."""
    environment = {**os.environ, "PYTHONPATH": str(directory), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHECK, str(directory), *ops]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=150)


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A directory with a copy of the kernels."""
    package = Path(gbla_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "gbla_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_planted_fault_is_caught(kernels: Path, fault: Fault) -> None:
    path = kernels / "gbla_kernels" / fault.file
    source = path.read_text()
    assert source.count(fault.text) == 1, f"{fault.file} has changed: plant the fault anew where {fault.text!r} went"
    path.write_text(source.replace(fault.text, fault.mistake))
    finished = laws_hold(kernels, fault.op)
    # by a law: not by an import that fails, nor because another copy of the package was found
    is_law = "_laws.py" in finished.stderr and "AssertionError" in finished.stderr
    assert finished.returncode != 0 and is_law, finished.stdout + finished.stderr


def test_without_a_fault_the_same_laws_hold(kernels: Path) -> None:
    finished = laws_hold(kernels, "attention", "conv")
    assert finished.returncode == 0 and "every law holds" in finished.stdout, finished.stderr
