"""``gated_linear_attention``: time, fraction of the bytes-floor, memory and error, forward and forward+backward, against its peers.

``python benchmarks/linear_attention.py`` (bf16; a table, a plot and the errors in fp64 go to benchmarks/results)
"""

# B rows, L tokens, H heads, K = V head width (docs/shapes.md)

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import flash_bla_peer
import torch
from exactness import MAX_ROWS, MEANING, error_columns, first_rows, op_errors
from gpu_timing import (
    DEVICE,
    L2_MULTIPLE,
    REPLAY_SECONDS,
    Ceilings,
    Figure,
    arguments_or_exit,
    attempt,
    first_call_seconds,
    graph_ms,
    input_sets,
    peak_megabytes,
    ratio,
)
from op_calls import Op, calls
from plain_attention import plain_attention
from report import write_report
from row_lengths import SINGLE_ROW_LENGTHS, Case, short, uniform, zipf
from time_plot import Points, plot_times
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention

NUM_HEADS = 8
HEAD_DIMS = (64, 128)
GATE_SPREAD = 3.0
PACKED = uniform(32, 2048)
LONG = uniform(1, 32768)
SHORT = short()
PLAIN_CASES = {uniform(1, length).name for length in (2048, 32768, 131072)}
"""Compiled per length, which takes seconds each."""
FLASH_BLA_CASES = {LONG.name, PACKED.name}
"""Tuned and compiled per power of two of the longest row and per width, which takes longer still."""
BYTES_PER_ELEMENT = 2
QUERY, KEY, VALUE, KEY_GATE, OUTPUT_GATE, NORM_WEIGHT = "query", "key", "value", "key_gate", "output_gate", "norm_weight"


@dataclass(frozen=True, eq=False)
class InputSet:
    """Leaves by argument name, in the order of the arguments, and the gradient of the output."""

    tensors: dict[str, Tensor]
    d_output: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return list(self.tensors.values())

    @classmethod
    def random(cls, case: Case, head_dim: int, seed: int) -> "InputSet":
        """Strided views of one projection, as the layer passes them, bf16."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        random = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16, generator=generator)
        width, shape = NUM_HEADS * head_dim, (case.num_tokens, NUM_HEADS, head_dim)
        projection = random(case.num_tokens, 4 * width + 64)
        query, key, value, output_gate, key_gate, _ = projection.split([width] * 4 + [NUM_HEADS, 64 - NUM_HEADS], dim=-1)
        key_gate.mul_(GATE_SPREAD)
        tensors = {
            QUERY: query.view(shape),
            KEY: key.view(shape),
            VALUE: value.view(shape),
            KEY_GATE: key_gate,
            OUTPUT_GATE: output_gate.view(shape),
            NORM_WEIGHT: 1 + random(NUM_HEADS, head_dim) / 8,
        }
        return cls({name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}, random(shape))

    def mapped(self) -> "InputSet":
        """What a bare linear attention takes: mapped queries and keys, and values, contiguous."""
        tensors = {name: flash_bla_peer.mapped(self.tensors[name]) for name in (QUERY, KEY)}
        tensors[VALUE] = self.tensors[VALUE].detach().contiguous().requires_grad_()
        return InputSet(tensors, self.d_output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=SINGLE_ROW_LENGTHS, help="tokens of single rows")
    parser.add_argument("--peers", choices=("none", "some", "all"), default="some", help="on which cases peers are compiled and tuned")
    arguments = arguments_or_exit(parser)
    cases = [*(uniform(1, length) for length in arguments.lengths), PACKED, zipf(), SHORT]
    head_dims, peers = tuple(arguments.head_dims), arguments.peers
    if arguments.quick:
        cases, head_dims, peers = [uniform(1, 2048), LONG, PACKED, SHORT], head_dims[:1], "none"
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    rows, errors = [], []
    for head_dim in head_dims:
        for case in cases:
            new_rows, new_errors = measure_case(case, head_dim, ceilings, peers)
            rows += new_rows
            errors.append({"rows x tokens": case.name, "K": head_dim, **new_errors})
            for row in new_rows:
                print({key: value for key, value in row.items() if value is not None}, flush=True)
            print(errors[-1], flush=True)
        # after each width: a long run that is stopped keeps what it has
        plot = plot_times("linear_attention", panels(rows, list(dict.fromkeys(row["K"] for row in rows))), directory=arguments.out)
        tables = {"Relative error against fp64, and its budget": errors}
        command = "python " + shlex.join(sys.argv)
        print(write_report("linear_attention", rows, command, notes(ceilings), tables=tables, plots=[plot], directory=arguments.out))


def notes(ceilings: Ceilings) -> str:
    return (
        f"bf16, H = {NUM_HEADS}, K = V, elu1, normalised, both gates and the norm on; query, key, value and gates are views of one "
        f"projection. Milliseconds per call: median of CUDA-graph replays ({REPLAY_SECONDS} s of them), inputs rotated through "
        f"{L2_MULTIPLE} x the L2 cache, both sides in this run. Ceilings of this run: {ceilings}. floor: the bytes that must move "
        "(forward: q, k, v and gates in, y out; backward: these and dy in, all gradients out) at the copy bandwidth; "
        f"`of floor` is floor / ms. Memory: the peak of one call beyond its inputs. {MEANING} in the first table; at most the first "
        f"{MAX_ROWS} rows. plain: "
        "the op as two matrix products under torch.compile, compiled for the length. flash_bla: varlen_linear_attention of "
        "fla-org/flash-bidirectional-linear-attention; bare: on mapped, contiguous inputs, without gates and norm; equal: with "
        "feature map, gate softmax, norm and gate compiled around it; first call: seconds of its forward and backward, tuning "
        "included. state path: our kernels with every row cut into splits. Empty: not measured."
    )


def measure_case(case: Case, head_dim: int, ceilings: Ceilings, peers: str) -> tuple[list[dict[str, Any]], dict[str, Figure]]:
    """The rows of both passes, and the errors."""
    # of the last case: compiled code, and what it keeps
    torch._dynamo.reset()
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    sets = input_sets(partial(InputSet.random, case, head_dim), case.num_tokens * NUM_HEADS * head_dim * 4 * BYTES_PER_ELEMENT)
    ours = triton_op(layout)
    errors = case_errors(case, head_dim)
    columns: dict[str, tuple[Op, list[InputSet]] | str] = {"ms": (ours, sets)}
    if case == SHORT:
        columns["state path (ms)"] = peer(lambda: state_path(layout), sets)
    if case.is_single and (peers == "all" or (peers == "some" and case.name in PLAIN_CASES)):
        columns["plain (ms)"] = (torch.compile(plain_attention, fullgraph=True, dynamic=False), sets)
    if peers == "all" or (peers == "some" and case.name in FLASH_BLA_CASES):
        columns["flash_bla bare (ms)"] = peer(lambda: flash_bla_peer.bare(case, layout.offsets), [one.mapped() for one in sets])
        columns["flash_bla equal (ms)"] = peer(lambda: flash_bla_peer.equal_work(case, layout.offsets), sets)
    first: Figure = None
    if isinstance(bare := columns.get("flash_bla bare (ms)"), tuple):
        first = attempt(first_call_seconds, calls(*bare, True)[0])
    rows = []
    for with_backward in (False, True):
        figures: dict[str, Figure] = {
            column: work if isinstance(work, str) else attempt(graph_ms, calls(*work, with_backward)) for column, work in columns.items()
        }
        floor = floor_bytes(case.num_tokens, head_dim, with_backward) / ceilings.copy_bytes_per_ms
        milliseconds = figures.pop("ms")
        row: dict[str, Any] = {
            "rows x tokens": case.name,
            "K": head_dim,
            "pass": "forward+backward" if with_backward else "forward",
            "ms": milliseconds,
            "floor (ms)": floor,
            "of floor": ratio(floor, milliseconds),
            "peak memory (MB)": attempt(peak_megabytes, calls(ours, sets, with_backward)[0]),
            **error_columns(errors, with_backward=with_backward),
        }
        for column, figure in figures.items():
            row[column] = figure
            row[f"{column.removesuffix(' (ms)')} / ours"] = ratio(figure, milliseconds)
        row["flash_bla first call (s)"] = first if with_backward else None
        rows.append(row)
    return rows, errors


def triton_op(layout: JaggedLayout) -> Op:
    return partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.TRITON)


def state_path(layout: JaggedLayout) -> Op:
    """The op with every row cut into splits, as if short rows had no path of their own."""
    from gbla_kernels.linear_attention.autograd import attend

    return partial(attend, splits=layout.all_splits, feature_map="elu1", normalize=True, eps=1e-6)


def peer(make: Callable[[], Op], sets: list[InputSet]) -> tuple[Op, list[InputSet]] | str:
    """The op with its inputs, or why there is none."""
    try:
        return make(), sets
    except (ImportError, ValueError) as error:
        return "not installed" if isinstance(error, ImportError) else str(error).split(",")[0]


def floor_bytes(num_tokens: int, head_dim: int, with_backward: bool, *, has_key_gate: bool = True, has_output_gate: bool = True) -> int:
    """Bytes that the op must move: each tensor read or written once per pass that needs it."""
    # q, k, v and z in, y out; backward: q, k, v, z and dy in, dq, dk, dv and dz out, the gate and its gradient
    num_inputs = 3 + has_output_gate
    elements = (num_inputs + 1) * head_dim + has_key_gate
    if with_backward:
        elements += (2 * num_inputs + 1) * head_dim + 2 * has_key_gate
    return num_tokens * NUM_HEADS * elements * BYTES_PER_ELEMENT


def case_errors(case: Case, head_dim: int) -> dict[str, Figure]:
    """On the first rows: ``y``, ``dquery``, ... and ``y budget``, ...; nothing where they are too many tokens."""
    part = first_rows(case)
    if part is None:
        return {}
    layout = JaggedLayout.from_lengths(part.lengths).to(DEVICE)
    inputs = InputSet.random(part, head_dim, seed=-1)
    reference = partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE)
    return op_errors(triton_op(layout), reference, inputs, list(inputs.tensors))


LINES = {"ms": "Triton", "floor (ms)": "floor (bytes)", "plain (ms)": "plain, compiled", "flash_bla equal (ms)": "flash_bla, equal work"}


def panels(rows: Sequence[Mapping[str, Any]], head_dims: Sequence[int]) -> dict[str, dict[str, Points]]:
    """One panel per width and pass: single rows only."""
    found: dict[str, dict[str, Points]] = {}
    for head_dim in head_dims:
        for name in ("forward", "forward+backward"):
            chosen = [row for row in rows if row["K"] == head_dim and row["pass"] == name and row["rows x tokens"].startswith("1 x ")]
            found[f"K = V = {head_dim}, {name}"] = {
                label: [(int(row["rows x tokens"][4:]), row[column]) for row in chosen if isinstance(row.get(column), float)]
                for column, label in LINES.items()
            }
    return found


if __name__ == "__main__":
    main()
