"""What is handed to cuDNN: graphs are run here by torch on the CPU, from the dimensions, strides, offsets and addresses they were given."""

import contextlib
import ctypes
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gbla_kernels import JaggedLayout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.models import cudnn_attention as module
from gbla_rec.models import length_classes
from gbla_rec.models.jagged_attention import jagged_attention

TYPES = types.SimpleNamespace(BFLOAT16=torch.bfloat16, HALF=torch.float16, FLOAT=torch.float32, INT32=torch.int32, INT64=torch.int64)
BATCHES = {
    "nasty": [5, 0, 1, 128],
    "equal": [40] * 3,
    "dense": [384] * 2,
    "three classes": [3, 1, 0, 520, 7, 129, 2],
    "empty row": [0],
    "no row": [],
}


RAGGED_CALLS = list[list[int]]()
"""Lengths of the rows of each graph that was run."""


class FakeTensor:
    """A tensor of a graph; each setter returns it, as cuDNN's do."""

    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Callable[..., "FakeTensor"]:
        if not name.startswith("set_"):
            raise AttributeError(name)

        def set_attribute(value: object) -> "FakeTensor":
            setattr(self, name.removeprefix("set_"), value)
            return self

        return set_attribute

    def flat(self, addresses: dict[int, int], size: int) -> Tensor:
        """``(size,)``, the memory at this tensor's address."""
        num_bytes = size * torch.empty(0, dtype=self.data_type).element_size()
        return torch.frombuffer((ctypes.c_char * num_bytes).from_address(addresses[self.uid]), dtype=self.data_type)

    def rows(self, addresses: dict[int, int], lengths: list[int]) -> list[Tensor]:
        """``(H, T, K)`` views of the rows that are not empty."""
        num_rows, num_heads, max_length, width = self.dim
        assert len(lengths) == num_rows and max(lengths) <= max_length
        starts, strides = self.ragged_offset.flat(addresses, num_rows + 1).tolist(), self.stride[1:]
        views = []
        for start, length in zip(starts, lengths, strict=False):
            if length:
                end = start + (length - 1) * strides[1] + (num_heads - 1) * strides[0] + width
                views.append(self.flat(addresses, end).as_strided((num_heads, length, width), strides, start))
        return views


class FakeGraph:
    """One attention, forward or backward."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def tensor(self, **attributes: Any) -> FakeTensor:
        return FakeTensor(**attributes)

    def sdpa(self, **operands: Any) -> list[FakeTensor]:
        self.operands, self.outputs = operands, [FakeTensor(), FakeTensor()]
        return self.outputs

    def sdpa_backward(self, **operands: Any) -> list[FakeTensor]:
        self.operands, self.outputs = operands, [FakeTensor() for _ in range(3)]
        return self.outputs

    def get_workspace_size(self) -> int:
        return 0

    def validate(self, *arguments: object) -> None:
        pass

    build_operation_graph = create_execution_plans = check_support = build_plans = validate

    def execute(self, addresses: dict[int, int], workspace: int, *, handle: int) -> None:
        lengths = self.operands["seq_len_q"].flat(addresses, self.operands["seq_len_q"].dim[0]).tolist()
        RAGGED_CALLS.append(lengths)
        read = {name: self.operands[name].rows(addresses, lengths) for name in ("q", "k", "v", "o", "dO", "stats") if name in self.operands}
        is_backward = "dO" in read
        outputs = self.outputs if is_backward or self.operands["generate_stats"] else self.outputs[:1]
        written = [output.rows(addresses, lengths) for output in outputs]
        for row in range(len(read["q"])):
            values = {name: rows[row].double() for name, rows in read.items()}
            scale = self.operands["attn_scale"]
            results = attention_gradients(**values, scale=scale) if is_backward else attention(**values, scale=scale)
            for rows, result in zip(written, results, strict=False):
                rows[row].copy_(result)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> list[Tensor]:
    """Output ``(..., T, K)`` and logarithms of the softmax sums ``(..., T, 1)``."""
    scores = q @ k.mT * scale
    return [scores.softmax(-1) @ v, scores.logsumexp(-1, keepdim=True)]


def attention_gradients(q: Tensor, k: Tensor, v: Tensor, o: Tensor, dO: Tensor, stats: Tensor, scale: float) -> list[Tensor]:
    """Gradients of q, k and v."""
    scores = q @ k.mT * scale
    assert relative_error(stats, scores.logsumexp(-1, keepdim=True)) < 1e-6
    weights = scores.softmax(-1)
    d_scores = weights * (dO @ v.mT - (dO * o).sum(-1, keepdim=True)) * scale
    return [d_scores @ k, d_scores.mT @ q, weights.mT @ dO]


def dense_kernel(query: Tensor, key: Tensor, value: Tensor, bias: None, with_stats: bool, *_: Any, **__: Any) -> tuple[Any, ...]:
    """What torch calls where all rows have one length: ``(B, H, T, K)``; its results have no layout that a caller may count on."""
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    out, stats = attention(query.double(), key.double(), value.double(), query.shape[-1] ** -0.5)
    unused = torch.zeros((), dtype=torch.int64)
    return out.to(query.dtype), stats.float() if with_stats else unused, *[unused] * 2, 0, 0, *[unused] * 3


def dense_backward_kernel(d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, *_: Any) -> list[Tensor]:
    assert all(x.stride(-1) == 1 for x in (query, key, value, out)) and d_out.transpose(1, 2).is_contiguous()
    q, k, v, o, d_o = (x.double() for x in (query, key, value, out, d_out))
    gradients = attention_gradients(q, k, v, o, d_o, stats.double(), query.shape[-1] ** -0.5)
    return [gradient.to(query.dtype) for gradient in gradients]


@pytest.fixture
def fake_cudnn(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    cudnn: Any = types.ModuleType("cudnn")
    cudnn.pygraph, cudnn.data_type = FakeGraph, TYPES
    cudnn.heur_mode = types.SimpleNamespace(A=0, FALLBACK=1)
    cudnn.create_handle, cudnn.set_stream = (lambda: 1), (lambda handle, stream: None)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(module, "_STATE", module._ThreadState())
    monkeypatch.setattr(length_classes, "_KNOWN_SHAPES", length_classes.KnownShapes())
    RAGGED_CALLS.clear()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_scaled_dot_product_cudnn_attention", dense_kernel, "CPU")
        library.impl("_scaled_dot_product_cudnn_attention_backward", dense_backward_kernel, "CPU")
        yield


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``torch.empty`` returns in the module is NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan if k["dtype"].is_floating_point else 0))


def heads(num_tokens: int) -> list[Tensor]:
    """Query, key and value: views of one projection."""
    projection = torch.randn(num_tokens, 3, 2, 16, generator=torch.Generator().manual_seed(0)).half()
    return list(projection.unbind(1))


def with_gradients(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    output = attend(*leaves)
    weighting = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output.dtype)
    return [output.detach(), *torch.autograd.grad((output * weighting).sum(), leaves)]


def registered(*arguments: Tensor) -> Tensor:
    return module.cudnn_attention_op(*arguments)[0]  # type: ignore[no-any-return]


@pytest.mark.usefixtures("fake_cudnn", "poisoned")
@pytest.mark.parametrize("op", [module.cudnn_attention, registered], ids=["eager", "registered"])
@pytest.mark.parametrize("batch", BATCHES)
def test_every_row_is_attended_in_place(batch: str, op: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_classes, "MERGED_BLOCKS", 0)
    layout = JaggedLayout.from_lengths(BATCHES[batch])
    assert len(length_classes.class_rows(layout.offsets, layout.offsets_cpu)) == {"three classes": 3, "empty row": 0, "no row": 0}.get(
        batch, 1
    )
    tensors = heads(layout.num_tokens)

    def attend(*x: Tensor) -> Tensor:
        return op(*x, layout.offsets, layout.offsets_cpu)

    actual = with_gradients(attend, tensors)
    expected = with_gradients(partial(jagged_attention, query_layout=layout, key_layout=layout), [x.double() for x in tensors])
    for found, exact in zip(actual, expected, strict=True):
        assert relative_error(found, exact) < 2 * torch.finfo(torch.float16).eps
    with torch.no_grad():
        assert torch.equal(attend(*tensors), actual[0])
    assert bool(RAGGED_CALLS) == (batch not in ("dense", "empty row", "no row"))


@pytest.mark.usefixtures("fake_cudnn")
@pytest.mark.parametrize("batch", ["equal", "dense"])
def test_strides_of_inputs_and_of_the_gradient_do_not_matter(batch: str) -> None:
    layout = JaggedLayout.from_lengths(BATCHES[batch])
    attend = partial(module.cudnn_attention, offsets=layout.offsets, offsets_cpu=layout.offsets_cpu)
    tensors = heads(layout.num_tokens)
    apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]
    for left, right in zip(with_gradients(attend, tensors), with_gradients(attend, apart), strict=True):
        assert torch.equal(left, right)
    leaves = [x.detach().requires_grad_() for x in tensors]
    row = torch.linspace(-1, 1, 16).half()
    for d_out in (row.expand_as(tensors[0]), torch.ones(()).half().expand_as(tensors[0])):
        results = [torch.autograd.grad(attend(*leaves), leaves, one) for one in (d_out, d_out.contiguous())]
        assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))


@pytest.mark.usefixtures("fake_cudnn")
def test_rows_of_one_length_are_ragged_where_the_order_of_sums_must_be_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = JaggedLayout.from_lengths([384])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with_gradients(partial(module.cudnn_attention, offsets=layout.offsets, offsets_cpu=layout.offsets_cpu), heads(384))
    assert RAGGED_CALLS == [[384], [384]]


@pytest.mark.usefixtures("fake_cudnn")
def test_lengths_make_no_plan() -> None:
    def run(lengths: list[int]) -> int:
        layout = JaggedLayout.from_lengths(lengths)
        with_gradients(lambda *x: module.cudnn_attention(*x, layout.offsets, layout.offsets_cpu), heads(layout.num_tokens))
        return len(module._STATE.plans)

    plans = run([300, 140, 90])
    for lengths in ([301, 141, 89], [384, 10, 130], [257, 200, 70]):
        assert run(lengths) == plans
    # fewer rows, shorter ones and fewer tokens take the plans of more
    for lengths in ([300, 200], [250, 230], [250, 150]):
        assert run(lengths) == plans


@pytest.mark.usefixtures("fake_cudnn")
def test_where_the_order_of_sums_must_be_fixed_plans_are_those_of_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(lengths: list[int]) -> None:
        layout = JaggedLayout.from_lengths(lengths)
        with_gradients(partial(module.cudnn_attention, offsets=layout.offsets, offsets_cpu=layout.offsets_cpu), heads(layout.num_tokens))

    run([300, 140, 90])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run([200, 210])
    own = [key for key in module._STATE.plans if key.is_deterministic or key.num_rows == 2]
    assert {(key.num_rows, key.max_length) for key in own} == {(2, 256)}
    assert {key.total_tokens for key in own} == {0, 512}


@pytest.mark.usefixtures("fake_cudnn")
def test_compiled_equals_eager_in_one_graph_for_ragged_rows_and_a_single_one() -> None:
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module.cudnn_attention, fullgraph=True, dynamic=True, backend=graphs)
    for lengths in ([5, 0, 200], [7, 30, 1, 400], [384], [256, 256]):
        layout = JaggedLayout.from_lengths(lengths)
        tensors = heads(layout.num_tokens)
        results = [
            with_gradients(partial(op, offsets=layout.offsets, offsets_cpu=layout.offsets_cpu), tensors)
            for op in (compiled, module.cudnn_attention)
        ]
        assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
    assert graphs.frame_count == 1


@pytest.mark.usefixtures("fake_cudnn")
def test_opcheck_passes() -> None:
    layout = JaggedLayout.from_lengths([5, 0, 9])
    tensors = [x.detach().requires_grad_() for x in heads(layout.num_tokens)]
    torch.library.opcheck(module.cudnn_attention_op, (*tensors, layout.offsets, layout.offsets_cpu))


def test_the_choice_of_kernel_is_a_constant_to_the_compiler() -> None:
    def chosen(query: Tensor) -> Tensor:
        return query * 2 if module.has_cudnn_kernel(query.device, query.dtype, query.shape[2]) else query * 3

    compiled = torch.compile(chosen, fullgraph=True, dynamic=True, backend="aot_eager")
    assert torch.equal(compiled(torch.ones(5, 2, 16).bfloat16()), torch.full((5, 2, 16), 3.0).bfloat16())


@pytest.mark.parametrize(
    ("frontend", "backend", "fits"),
    [((1, 17), 91900, False), ((1, 18), 91900, True), ((1, 22), 91900, True), ((1, 23), 91900, False), ((1, 25), 92200, True)],
)
def test_a_frontend_that_cudnn_refuses_is_not_used(frontend: tuple[int, int], backend: int, fits: bool) -> None:
    assert module._frontend_fits(frontend, backend) == fits
