"""cuDNN on ragged rows: equals attention of each row in fp64, row by row, without a synchronisation or a plan per length."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbla_kernels import JaggedLayout
from gbla_kernels.testing.cuda_graph import capture
from gbla_kernels.testing.error_budget import FUSED_ATTENTION_FACTORS, assert_errors_within, relative_error
from gbla_rec.models import cudnn_attention as module
from gbla_rec.models.cudnn_attention import cudnn_attention, has_cudnn_kernel
from gbla_rec.models.jagged_attention import jagged_attention

NUM_HEADS = 2
NAMES = ("output", "d_query", "d_key", "d_value")
BATCHES = {
    "nasty": [5, 0, 1, 130],
    "equal": [2048] * 4,
    "equal, of no multiple": [2000] * 4,
    "a giant among tiny rows": [3, 1, 0, 8192, *[7] * 600, 129],
    "one row": [1000],
    "three classes": [*[20] * 900, *[700] * 70, 9000],
}
needs_cudnn = pytest.mark.skipif(
    not (torch.cuda.is_available() and has_cudnn_kernel(torch.device("cuda"), torch.bfloat16, 64)),
    reason="needs Hopper and the extra cudnn",
)


def heads(num_tokens: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Query, key and value: views of one projection."""
    generator = torch.Generator("cuda").manual_seed(0)
    projection = torch.randn(num_tokens, 3, NUM_HEADS, head_dim, generator=generator, device="cuda", dtype=dtype)
    return list(projection.unbind(1))


def ragged(layout: JaggedLayout) -> Callable[..., Tensor]:
    return partial(cudnn_attention, offsets=layout.offsets, offsets_cpu=layout.offsets_cpu)


def with_gradients(attend: Callable[..., Tensor], tensors: list[Tensor], weighting: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad((output * weighting).sum(), leaves)]


def row_by_row(lengths: list[int]) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        rows = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        # the plain formula: a fused kernel of fp32 inputs may multiply in less
        with sdpa_kernel(SDPBackend.MATH):
            outputs = [
                F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in row))[0].transpose(0, 1) for row in rows if len(row[0])
            ]
        return torch.cat(outputs)

    return attend


def errors(actual: list[Tensor], expected: list[Tensor]) -> dict[str, float]:
    return {name: relative_error(found, exact) for name, found, exact in zip(NAMES, actual, expected, strict=True)}


def test_the_rule_asks_for_hopper_half_precision_and_a_width_in_bounds() -> None:
    assert not has_cudnn_kernel(torch.device("cpu"), torch.bfloat16, 64)
    if torch.cuda.is_available():
        assert not has_cudnn_kernel(torch.device("cuda"), torch.float32, 64)
        assert not has_cudnn_kernel(torch.device("cuda"), torch.bfloat16, 60)
        assert not has_cudnn_kernel(torch.device("cuda"), torch.bfloat16, 256)


@needs_cudnn
@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 32])
@pytest.mark.parametrize("batch", BATCHES)
def test_equals_each_row_alone_in_fp64(batch: str, head_dim: int) -> None:
    lengths = BATCHES[batch]
    layout = JaggedLayout.from_lengths(lengths).to("cuda")
    tensors = heads(layout.num_tokens, head_dim, torch.bfloat16)
    weighting = torch.randn(tensors[0].shape, device="cuda", dtype=torch.bfloat16)
    actual = with_gradients(ragged(layout), tensors, weighting)
    exact, in_fp32 = (
        with_gradients(row_by_row(lengths), [x.to(dtype) for x in tensors], weighting.to(dtype)) for dtype in (torch.float64, torch.float32)
    )
    rounded = [x.bfloat16() for x in in_fp32]
    assert_errors_within(*(dict(zip(NAMES, results, strict=True)) for results in (actual, exact, rounded)), FUSED_ATTENTION_FACTORS)


@needs_cudnn
@pytest.mark.gpu
def test_every_token_is_written_once_whatever_its_class(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = BATCHES["three classes"]
    layout = JaggedLayout.from_lengths(lengths).to("cuda")
    tensors = heads(layout.num_tokens, 64, torch.bfloat16)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        results = [with_gradients(ragged(layout), tensors, torch.ones_like(tensors[0])) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@needs_cudnn
@pytest.mark.gpu
def test_strided_views_equal_contiguous_tensors() -> None:
    layout = JaggedLayout.from_lengths([700, 3, 0, 300]).to("cuda")
    views = heads(layout.num_tokens, 64, torch.bfloat16)
    strided, contiguous = (
        cudnn_attention(*tensors, layout.offsets, layout.offsets_cpu) for tensors in (views, [x.contiguous() for x in views])
    )
    assert torch.equal(strided, contiguous)


@needs_cudnn
@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_lengths_make_no_plan() -> None:
    def step(lengths: list[int]) -> None:
        layout = JaggedLayout.from_lengths(lengths).pin_memory().to("cuda", non_blocking=True)
        tensors = heads(layout.num_tokens, 64, torch.bfloat16)
        with_gradients(partial(jagged_attention, query_layout=layout, key_layout=layout), tensors, torch.ones_like(tensors[0]))

    step([1000, 600, 300])
    plans = len(module._STATE.plans)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in ([1001, 601, 299], [1024, 600, 277], [900, 580, 412]):
            step(lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(module._STATE.plans) == plans


@needs_cudnn
@pytest.mark.gpu
def test_compiled_equals_eager() -> None:
    def attend(query: Tensor, key: Tensor, value: Tensor, layout: JaggedLayout) -> Tensor:
        return jagged_attention(query, key, value, layout, layout)

    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=graphs)
    for lengths in ([300, 0, 900], [5, 700, 1200, 33], [1024], [384] * 3):
        layout = JaggedLayout.from_lengths(lengths).to("cuda")
        tensors = heads(layout.num_tokens, 64, torch.bfloat16)
        assert torch.equal(compiled(*tensors, layout), attend(*tensors, layout))
        weighting = torch.ones_like(tensors[0])
        results = [with_gradients(partial(op, layout=layout), tensors, weighting) for op in (compiled, attend)]
        assert max(errors(*results).values()) < 1e-2
    # with and without gradients
    assert graphs.frame_count == 2


@needs_cudnn
@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1024], [384] * 3])
def test_a_forward_of_dense_rows_may_meet_the_backward_of_ragged_ones(lengths: list[int]) -> None:
    layout = JaggedLayout.from_lengths(lengths).to("cuda")
    tensors = heads(layout.num_tokens, 64, torch.bfloat16)
    offsets = (layout.offsets, layout.offsets_cpu)
    d_out = torch.randn_like(tensors[0])
    dense = module._run_forward(*tensors, *offsets, "forward")
    gradients = module._run_backward(d_out, *tensors, *dense, *offsets)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ragged = module._run_forward(*tensors, *offsets, "forward")
        from_dense = module._run_backward(d_out, *tensors, *dense, *offsets)
    finally:
        torch.use_deterministic_algorithms(False)
    from_ragged = module._run_backward(d_out, *tensors, *ragged, *offsets)
    assert relative_error(dense[1], ragged[1].double()) < 1e-5
    for found, expected in zip((ragged[0], *from_dense, *from_ragged), (dense[0], *gradients, *gradients), strict=True):
        assert relative_error(found, expected.double()) < 2 * torch.finfo(torch.bfloat16).eps


@needs_cudnn
@pytest.mark.gpu
def test_opcheck_passes() -> None:
    layout = JaggedLayout.from_lengths([300, 0, 900]).to("cuda")
    tensors = [x.detach().requires_grad_() for x in heads(layout.num_tokens, 64, torch.bfloat16)]
    # the gradients' sums have no fixed order: values are compared by the other tests
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    offsets = (layout.offsets, layout.offsets_cpu)
    torch.library.opcheck(module.cudnn_attention_op, (*tensors, *offsets), test_utils=tests)
    inputs = [x.detach() for x in tensors]
    output, stats = module.cudnn_attention_op(*inputs, *offsets)
    arguments = (torch.randn_like(output), *inputs, output, stats, *offsets)
    torch.library.opcheck(module.cudnn_attention_backward_op, arguments, test_utils=tests)


@needs_cudnn
@pytest.mark.gpu
def test_replays_from_a_cuda_graph() -> None:
    layout = JaggedLayout.from_lengths([300, 0, 900, *[5] * 700]).to("cuda")
    tensors = heads(layout.num_tokens, 64, torch.bfloat16)
    weighting = torch.ones_like(tensors[0])

    def run() -> list[Tensor]:
        return with_gradients(partial(jagged_attention, query_layout=layout, key_layout=layout), tensors, weighting)

    expected = run()
    replayed, replay = capture(run)
    replay()
    assert max(errors(replayed, expected).values()) < 1e-2
