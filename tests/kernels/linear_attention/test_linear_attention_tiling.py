"""How a row is cut up, into splits and into blocks of tokens, changes nothing beyond rounding: output and every gradient."""

from dataclasses import replace

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout, row_splits
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention import launches
from gbla_kernels.linear_attention.launch_config import LaunchConfig, launch_config
from gbla_kernels.row_splits import SPLIT, TINY_ROW_LIMITS
from gbla_kernels.testing.attention_laws import assert_equivalent
from gbla_kernels.testing.attention_subject import Subject, Tensors, Variant, assert_within

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="blocks that are not in the table may not fit a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
variants = pytest.mark.parametrize("variant", [Variant(), Variant(normalize=False, absent=("norm_weight",))], ids=["full", "sums"])
BLOCKED = ("state", "state_for_backward", "output", "row", "query_backward", "key_backward", "row_backward")
"""Kernels whose number of tokens in a block is free; a tiny row is one block."""


@variants
@pytest.mark.parametrize("split", [128, 1024])
def test_the_number_of_splits_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch, split: int, variant: Variant) -> None:
    subject, lengths = replace(TRITON, variant=variant), [3, 2 * SPLIT + 131, 0, SPLIT + 1]
    inputs, layout = subject.inputs(lengths, 0)
    monkeypatch.setattr(row_splits, "split_lengths", lambda lengths: torch.full_like(lengths, split))
    other = JaggedLayout.from_lengths(lengths)
    assert len(other.row_splits.splits) != len(layout.row_splits.splits)
    actual = subject.run(inputs, other)
    assert_equivalent(subject, inputs, layout, actual)


@variants
@pytest.mark.parametrize("block", [16, 128])
def test_the_size_of_blocks_changes_nothing_beyond_rounding(monkeypatch: pytest.MonkeyPatch, block: int, variant: Variant) -> None:
    subject = replace(TRITON, variant=variant)
    # a row for the kernels that keep its state in registers, and one that is split
    inputs, layout = subject.inputs([3, TINY_ROW_LIMITS[-1] + 7, 0, SPLIT + 45], 1)
    used = []

    def with_other_blocks(*arguments: object) -> LaunchConfig:
        config = launch_config(*arguments)  # type: ignore[arg-type]
        used.append(config)
        return replace(config, **{name: replace(getattr(config, name), block_tokens=block) for name in BLOCKED})

    with monkeypatch.context() as patch:
        patch.setattr(launches, "launch_config", with_other_blocks)
        actual = subject.run(inputs, layout)
    assert used and all(getattr(used[0], name).block_tokens != block for name in BLOCKED)
    assert_equivalent(subject, inputs, layout, actual)


@variants
@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_the_largest_gate_may_come_in_any_part_of_a_split(monkeypatch: pytest.MonkeyPatch, chunk: int, variant: Variant) -> None:
    """Gates are read 512 at a time; all of the others are at -inf, or far below, in turn."""
    subject = replace(TRITON, variant=variant)
    monkeypatch.setattr(row_splits, "split_lengths", lambda lengths: torch.full_like(lengths, 1408))
    inputs, layout = subject.inputs([1400], 2)
    assert len(layout.row_splits.splits) == 2 and int(layout.row_splits.splits[0, 2]) == 1400
    gates = inputs["key_gate"]
    for i, part in enumerate(gates.split(512)):
        part += 0.0 if i == chunk else (-torch.inf if (i - chunk) % 3 == 1 else -40.0)
    assert_near_fp64(subject, inputs, layout)


def test_gradients_of_norm_weight_add_up_over_more_rows_than_a_block_of_the_sum_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "SHARE_ROWS", 16)
    lengths = [1] * 35 + [SPLIT + 1]
    subject = replace(TRITON, key_dim=16, value_dim=16)
    assert_near_fp64(subject, *subject.inputs(lengths, 3))


def assert_near_fp64(subject: Subject, inputs: Tensors, layout: JaggedLayout) -> None:
    exact = subject.exact(inputs, layout)
    assert_within(subject.run(inputs, layout), exact, subject.budget(inputs, layout, exact))
