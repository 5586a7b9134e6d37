"""What each part of ``gated_linear_attention`` costs: the op with one part left out, and with none, beside flash_bla on the same inputs.

``python benchmarks/op_parts.py`` (bf16; the table goes to benchmarks/results)
"""

# L tokens, H heads, K = V head width (docs/shapes.md)

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import flash_bla_peer
import torch
from gpu_timing import DEVICE, L2_MULTIPLE, REPLAY_SECONDS, Ceilings, Figure, arguments_or_exit, attempt, graph_ms, input_sets, ratio
from linear_attention import (
    BYTES_PER_ELEMENT,
    KEY_GATE,
    LONG,
    NORM_WEIGHT,
    NUM_HEADS,
    OUTPUT_GATE,
    PACKED,
    InputSet,
    floor_bytes,
    peer,
)
from op_calls import Op, calls
from report import write_report
from row_lengths import Case
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention

HEAD_DIM = 64
ARGUMENTS = ("query", "key", "value", KEY_GATE, OUTPUT_GATE, NORM_WEIGHT)


@dataclass(frozen=True)
class Variant:
    """The op without the arguments ``left_out``, with other ``settings``; ``is_bare`` takes mapped, contiguous inputs."""

    left_out: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    is_bare: bool = False

    def op(self, layout: JaggedLayout, backend: Backend) -> Op:
        """``op(*leaves)``, leaves as ``ARGUMENTS`` has them, or the first three of them."""

        def run(*leaves: Tensor) -> Tensor:
            given = dict.fromkeys(ARGUMENTS) | dict(zip(ARGUMENTS, leaves, strict=False)) | dict.fromkeys(self.left_out)
            return gated_linear_attention(**given, offsets=layout.offsets, layout=layout, backend=backend, **self.settings)

        return run

    def floor_bytes(self, num_tokens: int, head_dim: int, with_backward: bool) -> int:
        """Bytes that this variant must move."""
        without = ARGUMENTS[3:] if self.is_bare else self.left_out
        has = {"has_key_gate": KEY_GATE not in without, "has_output_gate": OUTPUT_GATE not in without}
        return floor_bytes(num_tokens, head_dim, with_backward, **has)


VARIANTS = {
    "the op": Variant(),
    "without key gate": Variant((KEY_GATE,)),
    "without output gate": Variant((OUTPUT_GATE,)),
    "without norm": Variant((NORM_WEIGHT,)),
    "without normaliser": Variant(settings={"normalize": False}),
    "relu in place of elu1": Variant(settings={"feature_map": "relu"}),
    "none of these": Variant(settings={"normalize": False, "feature_map": "relu"}, is_bare=True),
}
NOTES = (
    f"bf16, H = {NUM_HEADS}, K = V = {HEAD_DIM}. Milliseconds per call: median of CUDA-graph replays ({REPLAY_SECONDS} s of them), inputs "
    f"rotated through {L2_MULTIPLE} x the L2 cache. The op: elu1, normalised, both gates and the norm on views of one projection. None of "
    "these: mapped, contiguous queries, keys and values alone, which relu leaves as they are, without a normaliser; flash_bla is "
    "varlen_linear_attention of fla-org/flash-bidirectional-linear-attention on the same tensors. floor: the bytes that the variant must "
    "move, at the copy bandwidth. Empty: not measured."
)


def main() -> None:
    arguments = arguments_or_exit(argparse.ArgumentParser(description=__doc__))
    ceilings = Ceilings.measure()
    rows = []
    for case in (PACKED,) if arguments.quick else (LONG, PACKED):
        for row in measure_case(case, ceilings):
            rows.append(row)
            print(row, flush=True)
    notes = f"{NOTES} Ceilings of this run: {ceilings}."
    print(write_report("op_parts", rows, "python " + shlex.join(sys.argv), notes, directory=arguments.out))


def measure_case(case: Case, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A row for each pass and variant, and for flash_bla."""
    torch._dynamo.reset()
    layout = JaggedLayout.from_lengths(case.lengths).to(DEVICE)
    sets = input_sets(partial(InputSet.random, case, HEAD_DIM), case.num_tokens * NUM_HEADS * HEAD_DIM * 4 * BYTES_PER_ELEMENT)
    bare_sets = [one.mapped() for one in sets]
    works: dict[str, tuple[Op, list[InputSet]] | str] = {
        name: (variant.op(layout, Backend.TRITON), bare_sets if variant.is_bare else sets) for name, variant in VARIANTS.items()
    }
    works["flash_bla"] = peer(lambda: flash_bla_peer.bare(case, layout.offsets), bare_sets)
    for with_backward in (False, True):
        whole: Figure = None
        for name, work in works.items():
            if isinstance(work, str):
                milliseconds: Figure = work
            else:
                milliseconds = attempt(graph_ms, calls(*work, with_backward, allow_unused=True))
            whole = milliseconds if whole is None else whole
            variant = VARIANTS.get(name, VARIANTS["none of these"])
            floor = variant.floor_bytes(case.num_tokens, HEAD_DIM, with_backward) / ceilings.copy_bytes_per_ms
            yield {
                "rows x tokens": case.name,
                "pass": "forward+backward" if with_backward else "forward",
                "variant": name,
                "ms": milliseconds,
                "of the op": ratio(milliseconds, whole),
                "floor (ms)": floor,
                "of floor": ratio(floor, milliseconds),
            }


if __name__ == "__main__":
    main()
