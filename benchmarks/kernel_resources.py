"""Registers, spills, shared memory and instructions of the kernels of the op, compiled for Hopper; runs anywhere, without a GPU.

``python benchmarks/kernel_resources.py`` (bf16; the table goes to benchmarks/results). What fits on a multiprocessor at once bounds a
kernel that waits: look here before a change of a kernel goes to a GPU. Versions of Triton differ: the committed table is that of 3.6.0,
which the GPUs of the other reports ran (``pip install --target DIR --no-deps triton==3.6.0``, then ``PYTHONPATH=DIR``).
"""

# L tokens, H heads, K = V head width (docs/shapes.md)

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from report import results_directory, write_report

from gbla_kernels.testing.compiled_kernels import call_op

NUM_HEADS = 8
HEAD_DIMS = (64, 128)
ROW_LENGTHS = {32_768: "long row", 100: "up to 128 tokens", 60: "up to 64", 30: "up to 32", 10: "up to 16"}
"""A length for each way in which rows are computed."""
CAPABILITY = 90
SCHEDULERS, SCHEDULER_REGISTERS = 4, 16_384
"""Of a multiprocessor; a warp's registers lie in those of its scheduler."""
SHARED_BYTES, MAX_THREADS, MAX_PROGRAMS = 228 * 1024, 2048, 32
REGISTER_UNIT, SHARED_PER_PROGRAM = 8, 1024
"""Registers of a thread are allotted in eights; a program takes some shared memory for itself (NVIDIA's tuning guide for Hopper)."""

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--quick", action="store_true", help="the forward of a long row only, without gradients")
    parser.add_argument("--out", type=Path, help="directory of the results (default: benchmarks/results; with --quick in the workspace)")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET must not be set: interpreted kernels are not compiled")
    rows: Rows = []
    for head_dim in arguments.head_dims:
        for length, name in list(ROW_LENGTHS.items())[: 1 if arguments.quick else None]:
            for with_backward in (False,) if arguments.quick else (False, True):
                for row in compiled_kernels(length, head_dim, with_backward=with_backward):
                    rows.append({"row": name, "K": head_dim, "pass": "forward+backward" if with_backward else "forward", **row})
                    print(rows[-1], flush=True)
    command = "python " + shlex.join(sys.argv)
    directory = results_directory(arguments.out, is_whole=not arguments.quick)
    print(write_report("kernel_resources", rows, command, notes(), directory=directory))


def notes() -> str:
    return (
        f"The kernels of gated_linear_attention, compiled for compute capability 9.0: bf16, H = {NUM_HEADS}, K = V, elu1, normalised, "
        "both gates and the norm on, eager mode. A forward whose gradients are wanted does more than one alone. Registers, and stack (what "
        "is spilled, in bytes of a thread): cuobjdump. Programs: how many (CUDA: thread blocks) a multiprocessor holds at once by "
        "registers, shared memory and threads. Instructions: of the whole kernel (nvdisasm); local: those that touch the stack. Nothing is "
        "run or timed."
    )


def compiled_kernels(length: int, head_dim: int, *, with_backward: bool) -> Rows:
    """One line per launch of a forward, and of a backward, of one row of ``length`` tokens."""
    found: Rows = []

    def compile_instead(kernel: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        found.append(resources(kernel.fn.__name__, kernel.warmup(*arguments, grid=(1,), **keywords)))

    call_op(compile_instead, [length], head_dim, capability=CAPABILITY, with_backward=with_backward, num_heads=NUM_HEADS)
    return found


def resources(name: str, compiled: Any) -> dict[str, Any]:
    """What one compiled kernel takes."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage = tool("cuobjdump", "-res-usage", path)
        code = tool("nvdisasm", "-c", path)
    match = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if match is None:
        raise RuntimeError(f"cuobjdump must print REG and STACK, got {usage!r}")
    registers, stack = map(int, match.groups())
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T\d]\s+)?([A-Z0-9]+)", code, re.MULTILINE)
    threads, shared = 32 * compiled.metadata.num_warps, compiled.metadata.shared
    return {
        "kernel": name,
        "warps": compiled.metadata.num_warps,
        "registers": registers,
        "stack (bytes)": stack,
        "shared memory (bytes)": shared,
        "programs": programs_at_once(threads, registers, shared),
        "instructions": len(instructions),
        "local": sum(each in ("LDL", "STL") for each in instructions),
    }


def programs_at_once(threads: int, registers: int, shared: int) -> int:
    """Programs of so many threads, registers a thread and bytes of shared memory that a multiprocessor holds."""
    allotted = -(-registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = threads // 32
    warps_at_once = SCHEDULERS * (SCHEDULER_REGISTERS // (allotted * 32))
    return min(warps_at_once // warps, SHARED_BYTES // (shared + SHARED_PER_PROGRAM), MAX_THREADS // threads, MAX_PROGRAMS)


def tool(name: str, *arguments: Any) -> str:
    """Output of one of the CUDA tools that Triton's wheel brings."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run(
        [path, *map(str, arguments)], capture_output=True, text=True, check=True, env={**os.environ, "LC_ALL": "C"}
    ).stdout


if __name__ == "__main__":
    main()
