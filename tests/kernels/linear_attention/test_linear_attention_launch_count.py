"""How many kernels a call launches: short sequences wait for launches, so one more is a slower layer.

Launches are recorded, not run: what they compute is tested elsewhere.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.causal_conv1d import autograd as conv_autograd
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention import autograd
from gbla_kernels.testing.inputs import attention_inputs
from gbla_rec.config import EncoderConfig
from gbla_rec.models.layers import GatedBidirectionalLinearAttention

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="without a GPU; benchmarks/gbla_layer.py counts on one")

TINY, TINY_BACK, SUMS = "tiny_row_kernel", "tiny_row_backward_kernel", "combine_gradients_kernel"
LONG, LONG_BACK = ["state_kernel", "output_kernel"], ["query_backward_kernel", SUMS, "key_backward_kernel"]
VIEWS = {"as_strided", "flatten", "narrow", "reshape", "select", "slice", "split", "split_with_sizes", "unflatten", "view"}
VIEWS |= {"empty_like", "linear", "matmul", "new_empty", "resolve_conj"}
"""Operations of torch that launch nothing themselves."""
COMBINED = ["state_kernel", "combine_states_kernel", "output_kernel"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    names: list[str] = []

    def record(kernel: Any, grid: tuple[Any, ...]) -> Callable[..., None]:
        names.append(kernel.fn.__name__)
        return lambda *arguments, **options: None

    for module in (autograd, conv_autograd):
        monkeypatch.setattr(module, "launch", record)
    return names


@pytest.mark.parametrize(
    ("lengths", "forward", "backward"),
    [
        ([9], [TINY], [TINY_BACK, SUMS]),
        ([9, 0, 16, 3] * 50, [TINY], [TINY_BACK, SUMS]),
        ([9, 30, 60, 100], [TINY] * 3 + ["row_kernel"], [TINY_BACK] * 3 + ["row_backward_kernel", SUMS]),
        ([200] * 500, LONG, LONG_BACK),
        ([512], LONG, LONG_BACK),
        ([1536], LONG, LONG_BACK),
        ([2048], LONG, LONG_BACK),
        ([32_768], COMBINED, LONG_BACK),
        ([2048] * 32, COMBINED, LONG_BACK),
        ([9, 2048], [TINY, *LONG], [TINY_BACK, *LONG_BACK]),
        ([0, 0], [], [SUMS]),
    ],
    ids=lambda value: f"{len(value)}_rows" if value and isinstance(value[0], int) and len(value) > 4 else None,
)
def test_a_call_launches_what_its_rows_need(launched: list[str], lengths: list[int], forward: list[str], backward: list[str]) -> None:
    inputs, layout = attention_inputs(lengths, num_heads=8, key_dim=64, value_dim=64, dtype=torch.bfloat16)
    y = gated_linear_attention(**inputs, offsets=layout.offsets, layout=layout, backend=Backend.TRITON)
    assert launched == forward
    launched.clear()
    torch.autograd.grad(y, [x for x in inputs.values() if x is not None], torch.ones_like(y))
    assert launched == backward


def test_without_the_norm_few_splits_need_no_sum(launched: list[str]) -> None:
    inputs, layout = attention_inputs([1536], num_heads=8, key_dim=64, value_dim=64, dtype=torch.bfloat16)
    y = gated_linear_attention(**{**inputs, "norm_weight": None}, offsets=layout.offsets, layout=layout, backend=Backend.TRITON)
    launched.clear()
    torch.autograd.grad(y, [x for name, x in inputs.items() if name != "norm_weight"], torch.ones_like(y))
    assert launched == ["query_backward_kernel", "key_backward_kernel"]


@pytest.mark.parametrize("length", [500, 1024, 1536, 2000])
def test_a_layer_of_one_short_row_is_five_launches(launched: list[str], length: int) -> None:
    layout = JaggedLayout.from_lengths([length])
    layer = GatedBidirectionalLinearAttention(EncoderConfig(model_dim=512, num_heads=8), backend=Backend.TRITON).bfloat16()
    x = torch.zeros(length, 512, dtype=torch.bfloat16)
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        layer(x, layout)
    assert launched == ["causal_conv1d_forward_kernel", *LONG]
    # of torch's operations on tokens, all that would launch a kernel; on a CPU the checks of offsets are some more
    events = [event for event in profiler.events() if event.name.startswith("aten::")]
    on_tokens = [event.name.removeprefix("aten::") for event in events if any(shape[:1] == [length] for shape in event.input_shapes)]
    assert [name for name in on_tokens if name not in VIEWS] == ["mm", "mm"]
