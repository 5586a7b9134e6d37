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
from gbla_kernels.testing.attention_subject import Subject, Variant

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="blocks that are not in the table may not fit a GPU"),
    pytest.mark.usefixtures("poisoned_memory"),
]

TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
variants = pytest.mark.parametrize("variant", [Variant(), Variant(normalize=False, absent=("norm_weight",))], ids=["full", "sums"])
BLOCKED = ("state", "output", "row", "query_backward", "key_backward", "row_backward")
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
