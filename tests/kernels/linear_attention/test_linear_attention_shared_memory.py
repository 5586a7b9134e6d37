"""What the compiler makes of shared memory: no result shows it, only time on Hopper, and on other GPUs a launch that is refused."""

import json
from collections.abc import Callable

import pytest

LOWER = """
import json

import torch

from gbla_kernels.testing.compiled_kernels import call_op, copied_tiles, lower

HOPPER, OTHER = 90, 86
# of K = V the widest that each entry of the table for other GPUs serves: narrower heads take less; K = 128 in fp32 has no short rows
WIDEST = ((torch.bfloat16, 64, [2048]), (torch.bfloat16, 128, [2048, 100]), (torch.float32, 64, [2048, 100]), (torch.float32, 128, [2048]))


def lowered(capability, dtype, head_dim, lengths, last, passes=(False, True), **options):
    found = {}

    def compile_instead(kernel, arguments, keywords):
        launch = (kernel.fn.__name__, *keywords.items())
        # kernels without a block of tokens add up states, in registers
        if "BT" in keywords and launch not in found:
            found[launch] = lower(kernel, arguments, keywords, last=last)

    for with_backward in passes:
        call_op(compile_instead, lengths, head_dim, capability=capability, with_backward=with_backward, dtype=dtype, **options)
    return [(launch[0], *text_and_metadata) for launch, text_and_metadata in found.items()]


tiles, conflicts, shared = {}, [], []
for head_dim in (64, 128):
    for name, ttgir, _ in lowered(HOPPER, torch.bfloat16, head_dim, [2048], "ttgir"):
        tiles[f"{name} {head_dim}"], found = copied_tiles(ttgir)
        conflicts += [f"{name} {head_dim}: {read}" for read in found]
# at K = 64: at 128 the query side reads a tile in conflict without the normaliser
for name, ttgir, _ in lowered(HOPPER, torch.bfloat16, 64, [2048], "ttgir", passes=(True,), normalize=False):
    tiles[f"{name} 64 without normaliser"], found = copied_tiles(ttgir)
    conflicts += [f"{name} without normaliser: {read}" for read in found]
for dtype, head_dim, lengths in WIDEST:
    for name, _, metadata in lowered(OTHER, dtype, head_dim, lengths, "llir"):
        shared.append([name, head_dim, str(dtype), metadata["shared"]])
# all keys of so wide a state at once would take 322 KiB
wide = [[name, metadata["shared"]] for name, _, metadata in lowered(HOPPER, torch.float32, 64, [2048], "llir", value_dim=256)]
print(json.dumps([tiles, conflicts, shared, wide]))
"""
TILES = {"state_kernel": 2, "output_kernel": 3, "query_backward_kernel": 3, "key_backward_kernel": 2}
"""Inputs that asynchronous copies bring: of the output kernel's two loops the query in both, and z in that for many splits."""


@pytest.mark.slow
def test_copied_tiles_are_read_without_conflicts_and_programs_fit_other_gpus(run_without_interpreter: Callable[[str], str]) -> None:
    tiles, conflicts, shared, wide = json.loads(run_without_interpreter(LOWER))
    # what keep_operand is for: with conflicts the query side of one long row took 132 us on an H100, not 119
    assert conflicts == []
    which = ("64", "128", "64 without normaliser")
    assert tiles == {f"{name} {variant}": count for name, count in TILES.items() for variant in which}
    assert {name for name, *_ in shared} == {*TILES, "row_kernel", "row_backward_kernel"}
    # of compute capability 8.6, 8.9 and 12.0
    assert [launch for launch in shared if launch[-1] > 99 * 1024] == []
    assert {name for name, _ in wide} == {*TILES} and [launch for launch in wide if launch[-1] > 227 * 1024] == []
