"""One GBLA layer against one softmax-attention layer: forward and forward+backward, its parts, its launches, and the crossover.

``python benchmarks/gbla_layer.py`` (bf16 weights and activations; a table and a plot go to benchmarks/results)
"""

# B rows, L tokens, T tokens of a row, D model width, H heads (docs/shapes.md)

import argparse
import copy
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from dense_attention import KERNELS, DenseSoftmaxLayer
from exactness import MAX_ROWS, MEANING, error_columns, first_rows, tensor_errors
from gpu_timing import (
    DEVICE,
    L2_MULTIPLE,
    REPLAY_SECONDS,
    Ceilings,
    Figure,
    arguments_or_exit,
    attempt,
    graph_ms,
    input_sets,
    kernel_names,
    peak_megabytes,
    ratio,
)
from linear_attention import floor_bytes
from report import write_report
from row_lengths import SINGLE_ROW_LENGTHS, Case, uniform, zipf
from time_plot import Points, plot_times
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout, causal_conv1d, gated_linear_attention_packed
from gbla_rec.config import EncoderConfig
from gbla_rec.models.layers import GatedBidirectionalLinearAttention, SoftmaxAttention

NUM_HEADS = 8
MODEL_DIMS = (512, 1024)
PARTS_LENGTHS = (1024, 4096, 32768)
BYTES_PER_ELEMENT = 2
SA_COLUMNS = {name: f"SA {name} (ms)" for name in KERNELS}
Layer = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model-dims", type=int, nargs="+", default=MODEL_DIMS)
    parser.add_argument("--lengths", type=int, nargs="+", default=SINGLE_ROW_LENGTHS, help="tokens of single rows")
    arguments = arguments_or_exit(parser)
    cases = [*(uniform(1, length) for length in arguments.lengths), uniform(32, 2048), zipf()]
    model_dims, parts_lengths = tuple(arguments.model_dims), PARTS_LENGTHS
    if arguments.quick:
        cases, parts_lengths = [uniform(1, length) for length in (1024, 1536, 32768)], (1024, 32768)
    ceilings = Ceilings.measure()
    print(ceilings, flush=True)
    rows, parts = [], []
    for model_dim in model_dims:
        for case in cases:
            for row in measure_case(case, model_dim, ceilings):
                rows.append(row)
                print({key: value for key, value in row.items() if value is not None}, flush=True)
        for length in parts_lengths:
            parts.append(measure_parts(uniform(1, length), model_dim))
            print(parts[-1], flush=True)
    summary = " ".join(crossover(rows, model_dim, name) for model_dim in model_dims for name in ("forward", "forward+backward"))
    print(summary, flush=True)
    plot = plot_times("gbla_layer", panels(rows, model_dims), directory=arguments.out)
    tables = {"Parts of the GBLA layer, forward, each alone": parts}
    command = "python " + shlex.join(sys.argv)
    text = f"{summary} {notes(ceilings)}"
    print(write_report("gbla_layer", rows, command, text, tables=tables, plots=[plot], directory=arguments.out))


def notes(ceilings: Ceilings) -> str:
    return (
        f"bf16 weights and activations, H = {NUM_HEADS}; forward without gradients; forward+backward with those of the input and all "
        "weights. GBLA: conv, one projection, the op, output projection, backend=TRITON. SA: projection, bidirectional softmax attention, "
        "output projection; neither has its block's norm. cuDNN and flash are torch's fused kernels, forced, on a "
        "dense batch without RoPE; jagged is this "
        f"library's SoftmaxAttention, with RoPE, where rows are packed. Milliseconds per call: median of CUDA-graph replays "
        f"({REPLAY_SECONDS} s of them), inputs rotated through {L2_MULTIPLE} x the L2 cache (the weights are not), all sides in this run. "
        f"Ceilings of this run: {ceilings}. floor: matrix products at the matmul rate plus the bytes of conv and op at the copy "
        "bandwidth. Launches: kernels and memory operations of one forward. Memory: the peak of one call beyond inputs and weights. "
        f"Faster: the fastest SA / GBLA. {MEANING}; the reference is the layer with backend=REFERENCE, its weights and inputs, and what is "
        f"between its parts, in bf16 too; at most the first {MAX_ROWS} rows. Empty: not measured."
    )


def measure_case(case: Case, model_dim: int, ceilings: Ceilings) -> list[dict[str, Any]]:
    """The rows of both passes."""
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    sets = input_sets(partial(random_input, case.num_tokens, model_dim), case.num_tokens * model_dim * BYTES_PER_ELEMENT)
    gbla = gbla_layer(model_dim)
    errors = layer_errors(gbla, case)
    layers: dict[str, tuple[nn.Module, Any]] = {"GBLA (ms)": (gbla, layout)}
    if case.is_uniform:
        for name, kernel in KERNELS.items():
            layers[SA_COLUMNS[name]] = (DenseSoftmaxLayer(model_dim, NUM_HEADS, kernel).to(DEVICE, torch.bfloat16), len(case.lengths))
    if not case.is_single:
        layers["SA jagged (ms)"] = (SoftmaxAttention(config(model_dim), backend=Backend.TRITON).to(DEVICE, torch.bfloat16), layout)
    rows = []
    for with_backward in (False, True):
        figures: dict[str, Figure] = {
            column: attempt(graph_ms, calls(layer, rows_of, sets, with_backward)) for column, (layer, rows_of) in layers.items()
        }
        milliseconds = figures["GBLA (ms)"]
        peers = [figure for column, figure in figures.items() if column.startswith("SA") and isinstance(figure, float)]
        floor = floor_ms(case.num_tokens, model_dim, ceilings, with_backward)
        row: dict[str, Any] = {
            "rows x tokens": case.name,
            "D": model_dim,
            "pass": "forward+backward" if with_backward else "forward",
            **figures,
            "faster": ratio(min(peers), milliseconds) if peers else None,
            "floor (ms)": floor,
            "of floor": ratio(floor, milliseconds),
            "peak memory (MB)": attempt(peak_megabytes, calls(gbla, layout, sets, with_backward)[0]),
            **error_columns(errors, with_backward=with_backward),
        }
        if not with_backward:
            names = attempt(kernel_names, calls(gbla, layout, sets, with_backward=False)[0])
            row["launches"] = names if isinstance(names, str) else len(names)
            if case.num_tokens in PARTS_LENGTHS and not isinstance(names, str):
                print(f"  launched: {'; '.join(name[:60] for name in names)}", flush=True)
        rows.append(row)
    return rows


def layer_errors(layer: GatedBidirectionalLinearAttention, case: Case) -> dict[str, Figure]:
    """Of output, ``dx`` and the gradients of all weights, on the first rows; nothing where they are too many tokens."""
    part = first_rows(case)
    if part is None:
        return {}
    layout = JaggedLayout.from_lengths(part.lengths).to(DEVICE)
    x, d_output = (random_input(part.num_tokens, layer.config.model_dim, seed).detach() for seed in (-1, -2))
    reference = copy.deepcopy(layer)
    reference.backend = Backend.REFERENCE

    def run(which: GatedBidirectionalLinearAttention, dtype: torch.dtype) -> list[Tensor]:
        leaf = x.to(dtype, copy=True).requires_grad_()
        return forward_backward(lambda tokens: which(tokens, layout), list(which.parameters()), leaf, d_output.to(dtype))

    names = ("y", "dx", *(f"d{name}" for name, _ in layer.named_parameters()))
    actual, rounded = (partial(run, which, x.dtype) for which in (layer, reference))
    return tensor_errors(names, actual, rounded, lambda: run(copy.deepcopy(reference).double(), torch.float64))


def measure_parts(case: Case, model_dim: int) -> dict[str, Any]:
    """Milliseconds of each part of the GBLA layer alone, forward, inputs rotated."""
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    layer = gbla_layer(model_dim)
    sets = input_sets(partial(random_input, case.num_tokens, model_dim), case.num_tokens * model_dim * BYTES_PER_ELEMENT)
    columns = layer.in_projection.out_features
    projections = input_sets(partial(random_input, case.num_tokens, columns), case.num_tokens * columns * BYTES_PER_ELEMENT)
    row: dict[str, Any] = {"rows x tokens": case.name, "D": model_dim}
    parts: dict[str, tuple[Layer, list[Tensor]]] = {
        "conv (ms)": (partial(run_conv, layer, layout), sets),
        "in-projection (ms)": (layer.in_projection, sets),
        "op (ms)": (partial(run_op, layer, layout), projections),
        "out-projection (ms)": (layer.out_projection, sets),
    }
    for column, (part, inputs) in parts.items():
        row[column] = attempt(graph_ms, [partial(without_gradients, part, x) for x in inputs])
    times = [row[column] for column in parts]
    row["sum (ms)"] = sum(times) if all(isinstance(time, float) for time in times) else None
    row["layer (ms)"] = attempt(graph_ms, calls(layer, layout, sets, with_backward=False))
    return row


def run_conv(layer: GatedBidirectionalLinearAttention, layout: JaggedLayout, x: Tensor) -> Tensor:
    assert layer.conv_weight is not None
    return causal_conv1d(x, layer.conv_weight, layer.conv_bias, layout.offsets, layout=layout, backend=Backend.TRITON)


def run_op(layer: GatedBidirectionalLinearAttention, layout: JaggedLayout, projection: Tensor) -> Tensor:
    dims = {"num_heads": NUM_HEADS, "key_dim": layer.head_dim, "value_dim": layer.head_dim}
    return gated_linear_attention_packed(projection, layer.norm_weight, layout.offsets, **dims, layout=layout, backend=Backend.TRITON)


def config(model_dim: int) -> EncoderConfig:
    return EncoderConfig(model_dim=model_dim, num_heads=NUM_HEADS)


def gbla_layer(model_dim: int) -> GatedBidirectionalLinearAttention:
    return GatedBidirectionalLinearAttention(config(model_dim), backend=Backend.TRITON).to(DEVICE, torch.bfloat16)


def random_input(num_tokens: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return torch.randn(num_tokens, width, device=DEVICE, dtype=torch.bfloat16, generator=generator).requires_grad_()


def calls(layer: nn.Module, rows_of: Any, sets: Sequence[Tensor], with_backward: bool) -> list[Callable[[], Any]]:
    """Calls of a layer whose second argument says where the rows are."""

    def run(x: Tensor) -> Tensor:
        return layer(x, rows_of)

    if not with_backward:
        return [partial(without_gradients, run, x) for x in sets]
    # the output's gradient is another set: random, and not in the cache either
    return [partial(forward_backward, run, list(layer.parameters()), x, sets[i - 1].detach()) for i, x in enumerate(sets)]


def without_gradients(layer: Layer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return layer(x)


def forward_backward(layer: Layer, parameters: list[Tensor], x: Tensor, d_output: Tensor) -> list[Tensor]:
    output = layer(x)
    return [output.detach(), *torch.autograd.grad(output, [x, *parameters], d_output)]


def floor_ms(num_tokens: int, model_dim: int, ceilings: Ceilings, with_backward: bool) -> float:
    """Matrix products at the matmul rate, conv and op at the copy bandwidth."""
    columns = 4 * model_dim + 64
    passes = 3 if with_backward else 1
    flop = 2 * num_tokens * model_dim * (columns + model_dim) * passes
    # conv: x in and x~ out; backward x and its gradient in, dx out
    conv_bytes = num_tokens * model_dim * BYTES_PER_ELEMENT * (5 if with_backward else 2)
    op_bytes = floor_bytes(num_tokens, model_dim // NUM_HEADS, with_backward)
    return flop / ceilings.matmul_flop_per_ms + (conv_bytes + op_bytes) / ceilings.copy_bytes_per_ms


def crossover(rows: Sequence[Mapping[str, Any]], model_dim: int, name: str) -> str:
    """The smallest measured row length from which on the GBLA layer is faster than the fastest SA layer."""
    lengths = None
    for row in single_rows(rows, model_dim, name)[::-1]:
        if row["faster"] is None or row["faster"] <= 1:
            break
        lengths = row["rows x tokens"][4:]
    return f"D = {model_dim}, {name}: GBLA is faster from T = {lengths} on." if lengths else f"D = {model_dim}, {name}: no crossover."


def single_rows(rows: Sequence[Mapping[str, Any]], model_dim: int, name: str) -> list[Mapping[str, Any]]:
    return [row for row in rows if row["D"] == model_dim and row["pass"] == name and row["rows x tokens"].startswith("1 x ")]


LINES = {"GBLA (ms)": "GBLA", "floor (ms)": "floor of GBLA", **{column: f"SA, {name}" for name, column in SA_COLUMNS.items()}}


def panels(rows: Sequence[Mapping[str, Any]], model_dims: Sequence[int]) -> dict[str, dict[str, Points]]:
    """One panel per width and pass: single rows only."""
    return {
        f"D = {model_dim}, {name}": {
            label: [
                (int(row["rows x tokens"][4:]), row[column])
                for row in single_rows(rows, model_dim, name)
                if isinstance(row.get(column), float)
            ]
            for column, label in LINES.items()
        }
        for model_dim in model_dims
        for name in ("forward", "forward+backward")
    }


if __name__ == "__main__":
    main()
