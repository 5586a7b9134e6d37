"""What a user waits for before the first result, what later batches compile, and what a call costs the host.

Seconds to the first forward and backward of a fresh process, with an empty Triton cache and again with the cache it left; kernels that 100
random batches compile after that; microseconds of the host in an eager call. ``python benchmarks/cold_start.py``
"""

# B rows, L tokens, H heads, K = V head width, D model width (docs/shapes.md)

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gpu_timing import DEVICE, arguments_or_exit, attempt, host_microseconds
from report import write_report
from torch import Tensor

NUM_HEADS = 8
NUM_TAPS = 4
HEAD_DIMS = (64, 128)
NUM_BATCHES = 100
EDGE_BATCHES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (16,), (17,), (512,), (513,), (16, 32, 4096), (0, 0, 5))
"""Among the random batches: no row, no token, one row, multiples of 16 and not."""
HOST_LENGTHS = (64, 128)
"""So little work that the host is the slower side."""
TIMEOUT_SECONDS = 240
NOTES = (
    f"First results: one process per line, bf16, H = {NUM_HEADS}, one batch of rows {{first_lengths}}; wall seconds after `import "
    "torch`, each step ended by a synchronisation; `op` is gated_linear_attention, `conv` causal_conv1d of width H K with "
    f"{NUM_TAPS} taps. The cache is a TRITON_CACHE_DIR of its own. Then {NUM_BATCHES} batches of random row lengths, no token, one "
    "token and one row among them, forward and backward of both: compiled kernels are counted as new cubin files in that "
    "directory. Host cost: median microseconds of the calling thread per eager call, queue never full, GPU not waited for, on "
    f"rows of {HOST_LENGTHS} tokens, K = {HEAD_DIMS[0]}; peers are plain torch calls on the same tensors."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", type=int, default=None, metavar="K", help=argparse.SUPPRESS)
    arguments = arguments_or_exit(parser)
    if arguments.child is not None:
        print(json.dumps(first_results(arguments.child)))
        return
    rows = []
    for head_dim in HEAD_DIMS[:1] if arguments.quick else HEAD_DIMS:
        with tempfile.TemporaryDirectory() as cache:
            for state in ("empty", "warm"):
                found = attempt(run_child, head_dim, cache)
                rows.append({"Triton cache": state, "K": head_dim, **({"error": found} if isinstance(found, str) else found)})
                print(rows[-1], flush=True)
    host_rows = measure_host()
    notes = NOTES.format(first_lengths=first_lengths())
    tables = {"Host cost of an eager call": host_rows}
    print(write_report("cold_start", rows, "python " + shlex.join(sys.argv), notes, tables=tables, directory=arguments.out))


def run_child(head_dim: int, cache: str) -> dict[str, Any]:
    """The figures of a fresh process that keeps its kernels in ``cache``."""
    command = [sys.executable, __file__, "--child", str(head_dim)]
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS)
    if done.returncode:
        raise RuntimeError(f"the process failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def first_results(head_dim: int) -> dict[str, Any]:
    """Figures of this process, which must not have run a kernel before."""
    clock = Steps()
    random_tensors(1, head_dim)
    clock.step("CUDA (s)")
    import gbla_kernels  # noqa: F401

    clock.step("import gbla_kernels (s)")
    run_batch(first_lengths(), head_dim, clock)
    before = compiled_kernels()
    for lengths in random_batches():
        run_batch(lengths, head_dim, Steps())
    after = compiled_kernels()
    return {**clock.seconds, "kernels in the cache": before, f"compiled by {NUM_BATCHES} more batches": after - before}


def first_lengths() -> tuple[int, ...]:
    """Of the first batch: rows of every class, and one of more splits than its readers may add up, so that every kernel runs."""
    # here: a fresh process measures this import
    from gbla_kernels.linear_attention.autograd import FOLD_LIMIT
    from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT, TINY_ROW_LIMITS, RowSplits

    combined = next(length for length in count(SPLIT, SPLIT) if RowSplits.from_lengths(torch.tensor([length])).most_splits > FOLD_LIMIT)
    return (combined, SHORT_LIMIT + 1, SHORT_LIMIT, *TINY_ROW_LIMITS, 1, 0)


def run_batch(lengths: tuple[int, ...], head_dim: int, clock: "Steps") -> None:
    """Forward and backward of both ops."""
    for name, call, leaves, d_output in ops(lengths, head_dim):
        clock.restart()
        output = call()
        clock.step(f"{name} forward (s)")
        torch.autograd.grad(output, leaves, d_output)
        clock.step(f"{name} backward (s)")


def ops(lengths: tuple[int, ...], head_dim: int) -> list[tuple[str, Callable[[], Tensor], list[Tensor], Tensor]]:
    """Name, call, leaves and gradient of the output of each op on random tensors."""
    from gbla_kernels import Backend, JaggedLayout, causal_conv1d, gated_linear_attention

    layout = JaggedLayout.from_lengths(lengths).to(DEVICE)
    rows = {"offsets": layout.offsets, "layout": layout, "backend": Backend.TRITON}
    attention, conv = random_tensors(layout.num_tokens, head_dim)
    return [
        ("op", partial(gated_linear_attention, *attention, **rows), attention, torch.randn_like(attention[2])),
        ("conv", partial(causal_conv1d, *conv, **rows), conv, torch.randn_like(conv[0])),
    ]


def random_tensors(num_tokens: int, head_dim: int) -> tuple[list[Tensor], list[Tensor]]:
    """Leaves, bf16: query, key, value, key_gate, output_gate and norm_weight of the op; x, weight and bias of the conv."""
    heads, width = (num_tokens, NUM_HEADS, head_dim), NUM_HEADS * head_dim
    shapes = (heads, heads, heads, heads[:2], heads, heads[1:]), ((num_tokens, width), (width, NUM_TAPS), (width,))
    attention, conv = ([torch.randn(shape, device=DEVICE, dtype=torch.bfloat16).requires_grad_() for shape in group] for group in shapes)
    return attention, conv


class Steps:
    """Wall seconds of named steps, each ended by a synchronisation."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def restart(self) -> None:
        torch.cuda.synchronize()
        self.last = time.perf_counter()

    def step(self, name: str) -> None:
        torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now


def random_batches() -> list[tuple[int, ...]]:
    """Row lengths of batches of all kinds."""
    source = random.Random(0)
    batches = list(EDGE_BATCHES)
    while len(batches) < NUM_BATCHES:
        longest = source.choice((3, 20, 700, 3000))
        batches.append(tuple(source.randint(0, longest) for _ in range(source.choice((1, 2, 7, 16, 33)))))
    return batches


def compiled_kernels() -> int:
    """Kernels that Triton has compiled into its cache."""
    return sum(1 for _ in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin"))


def measure_host() -> list[dict[str, Any]]:
    """Microseconds per eager call of the ops and of plain torch calls."""
    from gbla_kernels import Backend, JaggedLayout, gated_linear_attention

    head_dim = HEAD_DIMS[0]
    (_, op, op_leaves, _), (_, conv, conv_leaves, _) = ops(HOST_LENGTHS, head_dim)
    offsets = JaggedLayout.from_lengths(HOST_LENGTHS).offsets.to(DEVICE)
    without_layout = partial(gated_linear_attention, *op_leaves, offsets, backend=Backend.TRITON)
    query, key, value = op_leaves[:3]
    x, _, weight = conv_leaves
    calls: dict[str, tuple[Callable[[], Tensor], list[Tensor]]] = {
        "gated_linear_attention": (op, op_leaves),
        "gated_linear_attention without layout": (without_layout, op_leaves),
        "causal_conv1d": (conv, conv_leaves),
        "torch scaled_dot_product_attention": (partial(attention, query, key, value), [query, key, value]),
        "torch rms_norm": (partial(F.rms_norm, x, tuple(weight.shape), weight), [x, weight]),
        "torch mul": (partial(torch.mul, query, key), [query, key]),
    }
    rows = []
    for name, (call, leaves) in calls.items():
        row = {"call": name, "forward (us)": attempt(host_microseconds, partial(forward, call))}
        row["forward+backward (us)"] = attempt(host_microseconds, partial(forward_backward, call, leaves))
        print(row, flush=True)
        rows.append(row)
    return rows


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (query, key, value)))


def forward(call: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        call()


def forward_backward(call: Callable[[], Tensor], leaves: list[Tensor]) -> None:
    output = call()
    torch.autograd.grad(output, leaves, output.detach())


if __name__ == "__main__":
    main()
