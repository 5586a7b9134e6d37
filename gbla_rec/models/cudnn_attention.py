"""Softmax attention inside jagged rows by cuDNN's fused kernels, through nvidia-cudnn-frontend (extra ``cudnn``).

Where all rows have one length torch reaches the same kernels (``dense_rows.py``); its private ragged call, by its source, keeps no plan
and reads the longest row of a backward from the head width. Here plans are kept, by a key of rounded sizes: rows come in a few classes
of length (``length_classes.py``), their number and the longest are rounded up to sizes that were met before, and rows of other classes
are gaps between the rows.
"""

# L tokens, H heads, K head width, n rows of a class (docs/shapes.md)

import importlib
import importlib.metadata
import threading
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gbla_kernels.dispatch import is_traced
from gbla_rec.models.dense_rows import dense_backward, dense_forward, dense_length
from gbla_rec.models.length_classes import ClassRows, bucket, class_rows

MIN_FRONTEND, MIN_BACKEND = (1, 18), 90_600
"""Versions of nvidia-cudnn-frontend and of cuDNN: ragged statistics and 64-bit offsets."""
MIN_CAPABILITY = (9, 0)
MAX_HEAD_DIM = 128
ALIGNMENT = 8
"""Half-precision elements in 16 bytes: head widths, strides and addresses are multiples of it."""
DTYPES = (torch.bfloat16, torch.float16)
Pass = Literal["inference", "forward", "backward"]


def _frontend_version() -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in importlib.metadata.version("nvidia-cudnn-frontend").split(".")[:2])
    except importlib.metadata.PackageNotFoundError:
        return (0,)


FRONTEND_VERSION = _frontend_version()


def has_cudnn_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True if ``cudnn_attention`` exists for such heads: a rule of versions, device, dtype and width, never a trial."""
    return has_dense_cudnn_kernel(device, dtype, head_dim) and _frontend_fits(FRONTEND_VERSION, _cudnn_version())


def has_dense_cudnn_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """True if cuDNN's fused kernel exists for such heads in dense batches, where torch calls it by itself."""
    return dtype in DTYPES and head_dim % ALIGNMENT == 0 and head_dim <= MAX_HEAD_DIM and _has_cudnn(device)


def _frontend_fits(frontend: tuple[int, ...], backend: int) -> bool:
    # 1.23 and later set an attribute of reshapes in every backward, which cuDNN refuses before 9.22
    return frontend >= MIN_FRONTEND and (frontend < (1, 23) or backend >= 92200)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cudnn_version() -> int:
    return torch.backends.cudnn.version() or 0


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_cudnn(device: torch.device) -> bool:
    return device.type == "cuda" and _cudnn_version() >= MIN_BACKEND and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_cpu: Tensor) -> Tensor:
    """Each token attends to all tokens of its row.

    Args:
        query: ``(L, H, K)``, bf16 or fp16 on a device for which ``has_cudnn_kernel``; where rows are ragged, a view of a projection is
            copied, since cuDNN 9.19 gives wrong gradients, or faults, on tokens with gaps between them.
        key: the same.
        value: the same.
        offsets: ``(B + 1,)`` int64 on the device.
        offsets_cpu: the same on the CPU; what is derived from it lives as long as this tensor.

    Returns:
        ``(L, H, K)``, contiguous. The backward adds in no fixed order unless ``torch.use_deterministic_algorithms`` is on.
    """
    if is_traced(query, key, value):
        return cudnn_attention_op(query, key, value, offsets, offsets_cpu)[0]  # type: ignore[no-any-return]
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return _CudnnAttention.apply(query, key, value, offsets, offsets_cpu)  # type: ignore[no-any-return, no-untyped-call]
    return _run_forward(query, key, value, offsets, offsets_cpu, "inference")[0]


def _run_forward(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_cpu: Tensor, direction: Pass) -> tuple[Tensor, Tensor]:
    """Output ``(L, H, K)`` and, for "forward", the logarithms of the softmax sums ``(L, H)`` fp32."""
    if length := _dense_length(offsets_cpu):
        return dense_forward(query, key, value, length, with_stats=direction == "forward")
    num_tokens, num_heads, _ = query.shape
    tensors = {"query": query.contiguous(), "key": key.contiguous(), "value": value.contiguous()}
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    stats = torch.empty((num_tokens, num_heads), dtype=torch.float32, device=query.device)
    for rows in class_rows(offsets, offsets_cpu):
        _execute(direction, rows, {**tensors, "out": out}, stats, total_tokens=0)
    return out, stats


def _run_backward(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, offsets: Tensor, offsets_cpu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    # autograd may hand over an expanded gradient
    d_out = d_out.contiguous()
    if length := _dense_length(offsets_cpu):
        return dense_backward(d_out, query, key, value, out, stats, length)
    tensors = {"query": query.contiguous(), "key": key.contiguous(), "value": value.contiguous(), "out": out, "d_out": d_out}
    gradients = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    total_tokens = bucket(max(query.shape[0], 1))
    if not torch.are_deterministic_algorithms_enabled():
        total_tokens = _STATE.most_tokens = max(_STATE.most_tokens, total_tokens)
    tensors |= dict(zip(("d_query", "d_key", "d_value"), gradients, strict=True))
    for rows in class_rows(offsets, offsets_cpu):
        # bounds the workspace: without it, fp32 gradients of the queries for all n x longest tokens
        _execute("backward", rows, tensors, stats, total_tokens=total_tokens)
    return gradients[0], gradients[1], gradients[2]


def _dense_length(offsets_cpu: Tensor) -> int:
    # the backward of the ragged kernel adds in a fixed order where that is asked for
    return 0 if torch.are_deterministic_algorithms_enabled() else dense_length(offsets_cpu)


@dataclass(frozen=True, slots=True)
class PlanKey:
    """All that a plan depends on. ``strides`` are those of tokens and heads, by tensor name."""

    direction: Pass
    device: torch.device
    dtype: torch.dtype
    num_rows: int
    max_length: int
    num_heads: int
    head_dim: int
    strides: tuple[tuple[str, int, int], ...]
    total_tokens: int
    is_deterministic: bool


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A graph that cuDNN has compiled, the number of each tensor in it, and the bytes it needs to work in."""

    graph: Any
    numbers: dict[str, int]
    workspace_bytes: int


class _ThreadState(threading.local):
    """cuDNN's handles and plans, which threads must not share: autograd runs backward passes in threads of its own."""

    def __init__(self) -> None:
        self.handles: dict[torch.device, int] = {}
        self.plans: dict[PlanKey, Plan] = {}
        self.most_tokens = 0
        """Of all batches so far, a bucket: their backward passes share plans, at the workspace of the largest."""


_STATE = _ThreadState()
_COMPILED = list[PlanKey]()


def num_compiled_plans() -> int:
    """Plans that this process has compiled so far, about 0.1 s each on an H100: a step that meets new sizes waits for them.

    Those that torch makes for dense rows, one for each number and length of rows, are not counted.
    """
    return len(_COMPILED)


def _execute(direction: Pass, rows: ClassRows, tensors: dict[str, Tensor], stats: Tensor, *, total_tokens: int) -> None:
    """Run one pass over the rows of one class; reads and writes nothing outside of them."""
    query = tensors["query"]
    _, num_heads, head_dim = query.shape
    strides = tuple((name, x.stride(0), x.stride(1)) for name, x in tensors.items())
    is_deterministic = direction == "backward" and torch.are_deterministic_algorithms_enabled()
    sizes = (rows.num_rows, rows.max_length, num_heads, head_dim)
    key = PlanKey(direction, query.device, query.dtype, *sizes, strides, total_tokens, is_deterministic)
    with torch.cuda.device(query.device):
        handle = _handle(query.device)
        plan = _STATE.plans.get(key)
        if plan is None:
            plan = _STATE.plans[key] = _build(key, handle)
            _COMPILED.append(key)
        offsets = {_offsets_name(stride): rows.offsets(stride) for stride in {*(token for _, token, _ in strides), num_heads}}
        named = {**tensors, **offsets, "stats": stats, "query_lengths": rows.lengths, "key_lengths": rows.lengths}
        workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=query.device)
        addresses = {number: named[name].data_ptr() for name, number in plan.numbers.items()}
        plan.graph.execute(addresses, workspace.data_ptr(), handle=handle)


def _handle(device: torch.device) -> int:
    cudnn = importlib.import_module("cudnn")
    if device not in _STATE.handles:
        _STATE.handles[device] = cudnn.create_handle()
    handle = _STATE.handles[device]
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    return handle


def _offsets_name(stride: int) -> str:
    return f"offsets_{stride}"


class _GraphTensors:
    """The graph of a plan and its tensors, numbered by name. Dimensions are (rows, heads, tokens, width); rows begin at ragged offsets."""

    def __init__(self, key: PlanKey, handle: int) -> None:
        cudnn = importlib.import_module("cudnn")
        self.types = cudnn.data_type
        self._io_type = self.types.BFLOAT16 if key.dtype == torch.bfloat16 else self.types.HALF
        fp32 = {"intermediate_data_type": self.types.FLOAT, "compute_data_type": self.types.FLOAT}
        self.graph: Any = cudnn.pygraph(io_data_type=self._io_type, **fp32, handle=handle)
        self.numbers: dict[str, int] = {}
        self._key = key
        self._shape = [key.num_rows, key.num_heads, key.max_length, key.head_dim]
        self._stats_shape = [*self._shape[:3], 1]
        self._stats_stride = [key.num_heads * key.max_length, 1, key.num_heads, 1]
        self._strides = {name: (token, head) for name, token, head in key.strides}
        offset_strides = {*(token for token, _ in self._strides.values()), *(() if key.direction == "inference" else (key.num_heads,))}
        self._offsets = {
            stride: self.integers(_offsets_name(stride), key.num_rows + 1, self.types.INT64) for stride in sorted(offset_strides)
        }

    def integers(self, name: str, count: int, data_type: Any) -> Any:
        """An input of ``count`` integers: lengths or offsets of the rows."""
        return self._new(name, [count, 1, 1, 1], [1, 1, 1, 1], data_type)

    def read(self, name: str) -> Any:
        """An input of a value for each token and head."""
        tensor = self._new(name, self._shape, self._layout(name), self._io_type)
        tensor.set_ragged_offset(self._offset_of(name))
        return tensor

    def write(self, tensor: Any, name: str) -> None:
        """Have the graph write ``tensor`` out, laid out like an input."""
        self._write(tensor, name, self._shape, self._layout(name), self._io_type)
        tensor.set_ragged_offset(self._offset_of(name))

    def read_stats(self) -> Any:
        """The logarithms of the softmax sums, ``(L, H)`` fp32, as an input."""
        tensor = self._new("stats", self._stats_shape, self._stats_stride, self.types.FLOAT)
        tensor.set_ragged_offset(self._offsets[self._key.num_heads])
        return tensor

    def write_stats(self, tensor: Any) -> None:
        """Have the graph write them out."""
        self._write(tensor, "stats", self._stats_shape, self._stats_stride, self.types.FLOAT)
        tensor.set_ragged_offset(self._offsets[self._key.num_heads])

    def _new(self, name: str, shape: list[int], stride: list[int], data_type: Any) -> Any:
        return self.graph.tensor(name=name, dim=shape, stride=stride, data_type=data_type, uid=self._number(name))

    def _write(self, tensor: Any, name: str, shape: list[int], stride: list[int], data_type: Any) -> None:
        tensor.set_output(True).set_uid(self._number(name)).set_dim(shape).set_stride(stride).set_data_type(data_type)

    def _number(self, name: str) -> int:
        return self.numbers.setdefault(name, len(self.numbers) + 1)

    def _layout(self, name: str) -> list[int]:
        token, head = self._strides[name]
        # the stride of rows is not used where they have offsets
        return [token * self._key.max_length, head, token, 1]

    def _offset_of(self, name: str) -> Any:
        return self._offsets[self._strides[name][0]]


def _build(key: PlanKey, handle: int) -> Plan:
    """Compile the graph of one pass."""
    tensors = _GraphTensors(key, handle)
    graph = tensors.graph
    options = {
        "attn_scale": key.head_dim**-0.5,
        "use_padding_mask": True,
        "seq_len_q": tensors.integers("query_lengths", key.num_rows, tensors.types.INT32),
        "seq_len_kv": tensors.integers("key_lengths", key.num_rows, tensors.types.INT32),
    }
    operands = {"q": tensors.read("query"), "k": tensors.read("key"), "v": tensors.read("value")}
    if key.direction == "backward":
        stats = tensors.read_stats()
        gradients = graph.sdpa_backward(
            name="attention_backward",
            **operands,
            o=tensors.read("out"),
            dO=tensors.read("d_out"),
            stats=stats,
            max_total_seq_len_q=key.total_tokens,
            max_total_seq_len_kv=key.total_tokens,
            use_deterministic_algorithm=key.is_deterministic,
            **options,
        )
        for tensor, name in zip(gradients, ("d_query", "d_key", "d_value"), strict=True):
            tensors.write(tensor, name)
    else:
        out, stats = graph.sdpa(name="attention", **operands, generate_stats=key.direction == "forward", **options)
        tensors.write(out, "out")
        if key.direction == "forward":
            tensors.write_stats(stats)
    graph.validate()
    graph.build_operation_graph()
    modes = importlib.import_module("cudnn").heur_mode
    graph.create_execution_plans([modes.A, modes.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return Plan(graph, tensors.numbers, graph.get_workspace_size())


class _CudnnAttention(torch.autograd.Function):
    """The op in eager mode."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_cpu: Tensor) -> Tensor:
        out, stats = _run_forward(query, key, value, offsets, offsets_cpu, "forward")
        ctx.save_for_backward(query, key, value, out, stats, offsets)
        # not saved: the same object must come back, as rows are kept by it
        ctx.offsets_cpu = offsets_cpu
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, stats, offsets = ctx.saved_tensors
        return (*_run_backward(d_out, query, key, value, out, stats, offsets, ctx.offsets_cpu), None, None)


@torch.library.custom_op("gbla_rec::cudnn_attention", mutates_args=())
def cudnn_attention_op(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_cpu: Tensor) -> tuple[Tensor, Tensor]:
    """Opaque to compilers: lengths decide inside, where no guard sees them."""
    return _run_forward(query, key, value, offsets, offsets_cpu, "forward")


@torch.library.custom_op("gbla_rec::cudnn_attention_backward", mutates_args=())
def cudnn_attention_backward_op(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, offsets: Tensor, offsets_cpu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value."""
    return _run_backward(d_out, query, key, value, out, stats, offsets, offsets_cpu)


@cudnn_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, offsets_cpu: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    return out, torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)


@cudnn_attention_backward_op.register_fake
def _(
    d_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, stats: Tensor, offsets: Tensor, offsets_cpu: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    d_query, d_key, d_value = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value))
    return d_query, d_key, d_value


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, offsets, offsets_cpu = inputs
    ctx.save_for_backward(query, key, value, *output, offsets, offsets_cpu)


def _registered_backward(ctx: Any, d_out: Tensor, d_stats: Tensor) -> tuple[Tensor | None, ...]:
    return (*cudnn_attention_backward_op(d_out.contiguous(), *ctx.saved_tensors), None, None)


cudnn_attention_op.register_autograd(_registered_backward, setup_context=_save_inputs)
