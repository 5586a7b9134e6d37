"""Jagged softmax attention against dense cuDNN, and jagged cross-attention against torch's ``varlen_attn``.

``python benchmarks/softmax_attention.py`` (bf16; the table goes to benchmarks/results)
"""

# B rows, L tokens, T tokens of a row, H heads, K head width (docs/shapes.md)

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from dense_attention import KERNELS, dense_attention
from exactness import MEANING, error_columns, first_rows, op_errors
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
    ratio,
)
from op_calls import calls
from report import write_report
from row_lengths import Case, one_token_less, one_token_moved, uniform, zipf
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from gbla_kernels import Backend, JaggedLayout, jagged_cross_attention
from gbla_rec.models.cudnn_attention import has_cudnn_kernel
from gbla_rec.models.jagged_attention import jagged_attention

NUM_HEADS = 8
HEAD_DIMS = (64, 128)
EVEN = uniform(32, 2048)
RAGGED_TWINS = (one_token_less(32, 2048), one_token_moved(32, 2048))
"""As much work as ``EVEN``, but no kernel of dense rows runs them."""
# the twins last: cuDNN on ragged rows takes plans of earlier batches, theirs in place of smaller ones
SELF_CASES = (uniform(1, 32768), uniform(8, 8192), EVEN, zipf(), *RAGGED_TWINS)
QUICK_CASES = (SELF_CASES[0], EVEN, RAGGED_TWINS[0])
CROSS_CASES = ((2, 131072, 128), (128, 2048, 128))
"""Rows, keys of a row, queries of a row."""
BYTES_PER_ELEMENT = 2
LEAVES = ("query", "key", "value")
MAX_ERROR_LENGTH, MAX_ERROR_TOKENS = 2048, 16384
"""Of the self-attention whose errors are taken: the scores of all rows are kept in fp64 for the backward."""
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Operands:
    """``LEAVES`` of ``(L, H, K)``, and the gradient of the output."""

    leaves: tuple[Tensor, Tensor, Tensor]
    d_output: Tensor

    @classmethod
    def random(cls, num_queries: int, num_keys: int, head_dim: int, seed: int) -> "Operands":
        """Standard normal, bf16."""
        generator = torch.Generator(DEVICE).manual_seed(seed)
        random = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16, generator=generator)
        shapes = [(length, NUM_HEADS, head_dim) for length in (num_queries, num_keys, num_keys)]
        query, key, value = (random(shape).requires_grad_() for shape in shapes)
        return cls((query, key, value), random(shapes[0]))

    def dense(self, num_rows: int) -> "Operands":
        """The same numbers as ``(B, H, T, K)``, without a copy."""

        def view(x: Tensor) -> Tensor:
            return x.detach().unflatten(0, (num_rows, -1)).transpose(1, 2)

        query, key, value = (view(x).requires_grad_() for x in self.leaves)
        return Operands((query, key, value), view(self.d_output))


def main() -> None:
    arguments = arguments_or_exit(argparse.ArgumentParser(description=__doc__))
    quick = arguments.quick
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    rows, cross_rows = [], []
    for head_dim in HEAD_DIMS[:1] if quick else HEAD_DIMS:
        rows += measure_selves(QUICK_CASES if quick else SELF_CASES, head_dim)
        for rows_keys_queries in CROSS_CASES:
            cross_rows += shown(measure_cross(*rows_keys_queries, head_dim, ceilings))
    tables = {"Cross-attention": cross_rows}
    command = "python " + shlex.join(sys.argv)
    print(write_report("softmax_attention", rows, command, notes(ceilings), tables=tables, directory=arguments.out))


def notes(ceilings: Ceilings) -> str:
    return (
        f"bf16, H = {NUM_HEADS}, bidirectional. jagged: gbla_rec.models.jagged_attention on packed rows; dense: torch's "
        "scaled_dot_product_attention on the same rows as a dense batch, cuDNN and flash forced; varlen: torch's varlen_attn. Rows of one "
        "length are dense to jagged_attention too. Where one token is missing or moved they are ragged, and the dense peers run the even "
        f"rows; ragged rows run {ragged_kernel()}. A row above a power of two, as where a token is moved, is a launch of its own. "
        f"Milliseconds per call: median of CUDA-graph replays ({REPLAY_SECONDS} s of them), inputs rotated through {L2_MULTIPLE} x "
        f"the L2 cache, all sides in this run. Ceilings of this run: {ceilings}. First call: seconds of the jagged call's first "
        "forward and backward at these sizes. Cross-attention: gbla_kernels.jagged_cross_attention; floor: queries, keys, values "
        "in, output out (backward: these and the output's gradient in, three gradients out) at the copy bandwidth. "
        f"{MEANING}, the reference being jagged_cross_attention's; of self-attention on the first {MAX_ERROR_TOKENS} tokens in rows of at "
        f"most {MAX_ERROR_LENGTH}. Fused kernels round the gradients of scores too: tests allow dquery and dkey of self-attention twice "
        "this budget. Empty: not measured."
    )


def ragged_kernel() -> str:
    """Which kernel ``jagged_attention`` takes where rows are ragged: it hangs on an extra that may be missing."""
    device = torch.device(DEVICE)
    names = {True: "cuDNN's ragged kernel", False: "torch's varlen_attn, since the extra cudnn is missing or does not fit"}
    return " and ".join(dict.fromkeys(names[has_cudnn_kernel(device, torch.bfloat16, head_dim)] for head_dim in HEAD_DIMS))


def shown(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print({key: value for key, value in row.items() if value is not None}, flush=True)
    return rows


def measure_selves(cases: Sequence[Case], head_dim: int) -> list[dict[str, Any]]:
    measured = [shown(measure_self(case, head_dim)) for case in cases]
    # after all times: they leave plans behind that a first call must not find
    for case, rows in zip(cases, measured, strict=True):
        errors = self_errors(case, head_dim)
        for row in rows:
            row |= error_columns(errors, with_backward=row["pass"] != "forward")
        print({"rows x tokens": case.name, "K": head_dim, **errors}, flush=True)
    return [row for rows in measured for row in rows]


def measure_self(case: Case, head_dim: int) -> list[dict[str, Any]]:
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    set_bytes = 3 * case.num_tokens * NUM_HEADS * head_dim * BYTES_PER_ELEMENT
    sets = input_sets(partial(Operands.random, case.num_tokens, case.num_tokens, head_dim), set_bytes)
    ours = partial(jagged_attention, query_layout=layout, key_layout=layout)
    peers: dict[str, tuple[Attention, list[Operands]]] = {"varlen (ms)": (varlen(layout, layout), sets)}
    if (even := dense_peer(case)) is not None:
        dense_sets = input_sets(partial(dense_operands, even, head_dim), set_bytes)
        peers |= {f"dense {name} (ms)": (dense_attention(kernel), dense_sets) for name, kernel in KERNELS.items()}
    first = attempt(first_call_seconds, calls(ours, sets, True)[0])
    rows = []
    for with_backward in (False, True):
        figures: dict[str, Figure] = {column: attempt(graph_ms, calls(*peer, with_backward)) for column, peer in peers.items()}
        milliseconds = attempt(graph_ms, calls(ours, sets, with_backward))
        row = {"rows x tokens": case.name, "K": head_dim, "pass": "forward+backward" if with_backward else "forward"}
        row |= {"jagged (ms)": milliseconds, **figures}
        row["jagged / dense cuDNN"] = ratio(milliseconds, figures.get("dense cuDNN (ms)"))
        row["first call (s)"] = first if with_backward else None
        rows.append(row)
    return rows


def dense_peer(case: Case) -> Case | None:
    """The rows of one length that dense kernels run for ``case``: its own, or those of its twin."""
    return EVEN if case in RAGGED_TWINS else case if case.is_uniform else None


def dense_operands(case: Case, head_dim: int, seed: int) -> Operands:
    return Operands.random(case.num_tokens, case.num_tokens, head_dim, seed).dense(len(case.lengths))


def measure_cross(num_rows: int, num_keys: int, num_queries: int, head_dim: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    query_layout = JaggedLayout.from_lengths([num_queries] * num_rows).to(DEVICE)
    key_layout = JaggedLayout.from_lengths([num_keys] * num_rows).to(DEVICE)
    query_bytes, key_bytes = (num_rows * length * NUM_HEADS * head_dim * BYTES_PER_ELEMENT for length in (num_queries, num_keys))
    sets = input_sets(partial(Operands.random, num_rows * num_queries, num_rows * num_keys, head_dim), query_bytes + 2 * key_bytes)
    op = partial(jagged_cross_attention, query_layout=query_layout, key_layout=key_layout, backend=Backend.TRITON)
    errors = attention_errors(op, query_layout, key_layout, head_dim)
    rows = []
    for with_backward in (False, True):
        ours = attempt(graph_ms, calls(op, sets, with_backward))
        peer = attempt(graph_ms, calls(varlen(query_layout, key_layout), sets, with_backward))
        # forward: q, k, v in, output out; backward: q, k, v, output, its gradient in, three gradients out
        floor_bytes = 2 * query_bytes + 2 * key_bytes + ((4 * query_bytes + 4 * key_bytes) if with_backward else 0)
        floor = floor_bytes / ceilings.copy_bytes_per_ms
        rows.append(
            {
                "rows x keys x queries": f"{num_rows} x {num_keys} x {num_queries}",
                "K": head_dim,
                "pass": "forward+backward" if with_backward else "forward",
                "cross-attention (ms)": ours,
                "varlen (ms)": peer,
                "faster": ratio(peer, ours),
                "floor (ms)": floor,
                "of floor": ratio(floor, ours),
                **error_columns(errors, with_backward=with_backward),
            }
        )
    return rows


def self_errors(case: Case, head_dim: int) -> dict[str, Figure]:
    """Of ``jagged_attention``, on the first rows that are not too long; nothing if there are none."""
    part = error_rows(case)
    if part is None:
        return {}
    layout = JaggedLayout.from_lengths(part.lengths).to(DEVICE)
    return attention_errors(partial(jagged_attention, query_layout=layout, key_layout=layout), layout, layout, head_dim)


def error_rows(case: Case) -> Case | None:
    return first_rows(case.without_rows_above(MAX_ERROR_LENGTH), max_tokens=MAX_ERROR_TOKENS)


def attention_errors(op: Attention, query_layout: JaggedLayout, key_layout: JaggedLayout, head_dim: int) -> dict[str, Figure]:
    operands = Operands.random(query_layout.num_tokens, key_layout.num_tokens, head_dim, seed=-1)
    reference = partial(jagged_cross_attention, query_layout=query_layout, key_layout=key_layout, backend=Backend.REFERENCE)
    return op_errors(op, reference, operands, LEAVES)


def varlen(query_layout: JaggedLayout, key_layout: JaggedLayout) -> Attention:
    offsets = {"cu_seq_q": query_layout.offsets_int32, "cu_seq_k": key_layout.offsets_int32}
    return partial(varlen_attn, **offsets, max_q=query_layout.max_length, max_k=key_layout.max_length)


if __name__ == "__main__":
    main()
