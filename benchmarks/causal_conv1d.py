"""The depthwise convolution, and with the RMSNorm before it: one fused op against the two of them.

``python benchmarks/causal_conv1d.py`` (bf16; the table goes to benchmarks/results)
"""

# L tokens, D model width, R conv taps (docs/shapes.md)

import argparse
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from exactness import MAX_ROWS, MEANING, error_columns, first_rows, op_errors
from gpu_timing import DEVICE, L2_MULTIPLE, REPLAY_SECONDS, Ceilings, Figure, arguments_or_exit, attempt, graph_ms, input_sets, ratio
from op_calls import Op, calls
from report import write_report
from row_lengths import Case, short, uniform, zipf
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, causal_conv1d, rms_norm_causal_conv1d

DIMS = (512, 1024)
TAPS = 4
EPS = torch.finfo(torch.float32).eps
CASES = (uniform(1, 2048), uniform(1, 32768), uniform(32, 2048), zipf(), short())
BYTES_PER_ELEMENT = 2
TENSORS_MOVED = {"forward": 2, "forward+backward": 5}
"""Tensors of (L, D) that must move: x in, y out; backward: x and dy in, dx out. Weights are small."""
LEAVES = ("x", "norm_weight", "weight", "bias")


@dataclass(frozen=True, eq=False)
class Operands:
    """``LEAVES``, and the gradient of the output."""

    leaves: tuple[Tensor, Tensor, Tensor, Tensor]
    d_output: Tensor

    @classmethod
    def random(cls, num_tokens: int, dim: int, seed: int) -> "Operands":
        """Standard normal activations in bf16; parameters in fp32, as a module under autocast has them."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        random = partial(torch.randn, device=DEVICE, generator=generator)
        parameters = (1 + random(dim) / 8, random(dim, TAPS) / 4, random(dim) / 8)
        x, d_output = (random(num_tokens, dim, dtype=torch.bfloat16) for _ in range(2))
        norm_weight, weight, bias = (parameter.requires_grad_() for parameter in parameters)
        return cls((x.requires_grad_(), norm_weight, weight, bias), d_output)


def main() -> None:
    arguments = arguments_or_exit(argparse.ArgumentParser(description=__doc__))
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    rows = []
    for dim in DIMS[:1] if arguments.quick else DIMS:
        for case in CASES[:2] if arguments.quick else CASES:
            for row in measure(case, dim, ceilings):
                rows.append(row)
                print(row, flush=True)
    command = "python " + shlex.join(sys.argv)
    print(write_report("causal_conv1d", rows, command, notes(ceilings), directory=arguments.out))


def notes(ceilings: Ceilings) -> str:
    return (
        f"bf16 activations, fp32 parameters, {TAPS} taps, SiLU, jagged rows. conv: causal_conv1d. fused: rms_norm_causal_conv1d. apart: "
        "torch's RMSNorm, then causal_conv1d; compiled: these two under torch.compile, where the norm becomes a kernel of Inductor. "
        f"Milliseconds per call: median of CUDA-graph replays ({REPLAY_SECONDS} s of them), inputs rotated through {L2_MULTIPLE} x the "
        f"L2 cache, all sides in this run. Ceilings of this run: {ceilings}. floor: x in and y out (backward: x and dy in, dx out) at the "
        "copy bandwidth, for conv and fused alike. Gradients are those of x and all parameters. "
        f"{MEANING}, for conv and fused each; at most the first {MAX_ROWS} rows. Empty: not measured."
    )


def measure(case: Case, dim: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    # compiled code of the last case, and what it keeps
    torch._dynamo.reset()
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    sets = input_sets(partial(Operands.random, case.num_tokens, dim), 2 * case.num_tokens * dim * BYTES_PER_ELEMENT)
    errors = {name: case_errors(op, case, dim) for name, op in (("conv", conv), ("fused", fused))}
    apart = partial(norm_then_conv, layout)
    ops: dict[str, Op] = {
        "conv (ms)": partial(conv, layout),
        "fused (ms)": partial(fused, layout),
        "apart (ms)": apart,
        "compiled (ms)": torch.compile(apart, fullgraph=True, dynamic=False),
    }
    rows = []
    for name, num_tensors in TENSORS_MOVED.items():
        # unused: the bare convolution does not read the weight of the norm
        calls_of = partial(calls, sets=sets, with_backward=name != "forward", allow_unused=True)
        figures: dict[str, Figure] = {column: attempt(graph_ms, calls_of(op)) for column, op in ops.items()}
        floor = num_tensors * case.num_tokens * dim * BYTES_PER_ELEMENT / ceilings.copy_bytes_per_ms
        row: dict[str, Any] = {"rows x tokens": case.name, "D": dim, "pass": name, **figures, "floor (ms)": floor}
        row["conv of floor"], row["fused of floor"] = (ratio(floor, figures[column]) for column in ("conv (ms)", "fused (ms)"))
        row["compiled / fused"] = ratio(figures["compiled (ms)"], figures["fused (ms)"])
        for op, found in errors.items():
            row |= {f"{op} {column}": figure for column, figure in error_columns(found, with_backward=name != "forward").items()}
        rows.append(row)
    return rows


def case_errors(op: Callable[..., Tensor], case: Case, dim: int) -> dict[str, Figure]:
    """Of output and gradients of ``conv`` or ``fused``, on the first rows; nothing where they are too many tokens."""
    part = first_rows(case)
    if part is None:
        return {}
    layout = JaggedLayout.from_lengths(part.lengths).to(DEVICE)
    operands = Operands.random(part.num_tokens, dim, seed=-1)
    reference = partial(op, layout, backend=Backend.REFERENCE)
    return op_errors(partial(op, layout), reference, operands, LEAVES, allow_unused=True)


def conv(
    layout: JaggedLayout, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = Backend.TRITON
) -> Tensor:
    return causal_conv1d(x, weight, bias, layout.offsets, layout=layout, backend=backend)


def fused(
    layout: JaggedLayout, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor, *, backend: Backend = Backend.TRITON
) -> Tensor:
    return rms_norm_causal_conv1d(x, norm_weight, weight, bias, layout.offsets, eps=EPS, layout=layout, backend=backend)


def norm_then_conv(layout: JaggedLayout, x: Tensor, norm_weight: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normed = F.rms_norm(x, (x.shape[1],), norm_weight.to(x.dtype), EPS)
    return conv(layout, normed, norm_weight, weight, bias)


if __name__ == "__main__":
    main()
