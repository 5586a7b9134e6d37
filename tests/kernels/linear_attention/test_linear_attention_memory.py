"""Backward keeps the very tensors it was given, views of one projection among them, and states of long rows: nothing per token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention, gated_linear_attention_packed
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT

pytestmark = [] if INTERPRETED else pytest.mark.gpu

DEVICE = "cpu" if INTERPRETED else "cuda"
NUM_HEADS, KEY_DIM, VALUE_DIM = 2, 16, 24
WIDTHS = {"query": KEY_DIM, "key": KEY_DIM, "value": VALUE_DIM, "output_gate": VALUE_DIM}
COLUMNS = NUM_HEADS * (sum(WIDTHS.values()) + 1)
STATE_BYTES = 4 * NUM_HEADS * (KEY_DIM * VALUE_DIM + KEY_DIM + 2)
"""Of a row with splits, as the README of linear_attention has it."""
FEWEST_STATES = 2
"""There is room for two states at least."""


def projection_of(layout: JaggedLayout) -> Tensor:
    """A bit wider than its parts."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(layout.num_tokens, COLUMNS + 6, generator=generator).to(DEVICE)


def saved_by(call: Callable[[], Tensor]) -> list[Tensor]:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        call()
    return saved


def views_of(projection: Tensor) -> dict[str, Tensor]:
    """Leaves whose memory is that of the projection."""
    *wide, key_gate, _ = projection.split([*(NUM_HEADS * width for width in WIDTHS.values()), NUM_HEADS, 6], dim=1)
    views = {name: part.unflatten(1, (NUM_HEADS, -1)) for name, part in zip(WIDTHS, wide, strict=True)}
    return {name: view.detach().requires_grad_() for name, view in {**views, "key_gate": key_gate}.items()}


def kept_beside(saved: list[Tensor], *given: Tensor) -> int:
    """Bytes of what was saved and is in the memory of none of ``given``."""
    known = {x.untyped_storage().data_ptr() for x in given}
    return sum(x.numel() * x.element_size() for x in saved if x.untyped_storage().data_ptr() not in known)


@pytest.mark.parametrize("is_packed", [False, True], ids=["views", "packed"])
@pytest.mark.parametrize(
    ("lengths", "num_split"),
    [
        ([3, 0, 17], 0),
        ([64] * 9, 0),
        ([SPLIT + 1, 5], 1),
        ([3 * SPLIT, 1, SPLIT + 1, SHORT_LIMIT, SHORT_LIMIT + 1, 2 * SPLIT], 4),
        ([2048], 1),
    ],
)
def test_backward_keeps_its_inputs_and_a_state_of_each_long_row(lengths: list[int], num_split: int, is_packed: bool) -> None:
    layout = JaggedLayout.from_lengths(lengths).to(DEVICE)
    rows = {"offsets": layout.offsets, "layout": layout, "backend": Backend.TRITON}
    projection = projection_of(layout)
    norm_weight = torch.ones(NUM_HEADS, VALUE_DIM, device=DEVICE, requires_grad=True)
    if is_packed:
        projection.requires_grad_()
        dims = {"num_heads": NUM_HEADS, "key_dim": KEY_DIM, "value_dim": VALUE_DIM}
        saved = saved_by(lambda: gated_linear_attention_packed(projection, norm_weight, **dims, **rows))
    else:
        views = views_of(projection)
        saved = saved_by(lambda: gated_linear_attention(**views, norm_weight=norm_weight, **rows))
        # the addresses and strides of the views: nothing was copied on the way to the kernels
        places = {(x.data_ptr(), x.stride()) for x in saved}
        assert all((x.data_ptr(), x.stride()) in places for x in views.values())
    assert kept_beside(saved, projection, norm_weight) == STATE_BYTES * max(num_split, FEWEST_STATES)
