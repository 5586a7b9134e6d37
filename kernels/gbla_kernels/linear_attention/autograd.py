"""Joins the kernels to autograd: directly in eager mode, as registered ops under a compiler."""

# L tokens, H heads, K key width, V value width, Z splits, G rows with splits, S short rows (docs/shapes.md)

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gbla_kernels.dispatch import INTERPRETED, Launcher, is_traced, launch, operator, traced_launch
from gbla_kernels.linear_attention.launches import Inputs, RowStates, Work, new_states, run_backward, run_forward
from gbla_kernels.row_splits import RowSplits

FOLD_LIMIT = 8
"""The partial states of a row of at most so many splits may be added up by each of their readers, which saves a launch ..."""
FOLD_BYTES = 20 * 2**20
"""... if all readers together then load no more than this beyond one state each: about what an H100's L2 cache delivers meanwhile."""
OUTPUT_PROGRAMS = 24 if INTERPRETED else 264
"""With fewer splits, splits are cut into pieces: two for each multiprocessor of an H100. The interpreter runs them one by one."""
KEY_PROGRAMS = 12 if INTERPRETED else 132
"""The same for the key side of backward, whose programs read larger states and fill a multiprocessor sooner."""
MAX_PIECES = 8
"""Of a split: a piece is at least one block of tokens of a long split."""


class _Attend(torch.autograd.Function):
    """The op in eager mode."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_gate: Tensor | None,
        output_gate: Tensor | None,
        norm_weight: Tensor | None,
        work: Work,
    ) -> Tensor:
        x = Inputs(query, key, value, key_gate, output_gate)
        out, states = run_forward(launch, x, norm_weight, work)
        ctx.save_for_backward(query, key, value, key_gate, output_gate, norm_weight, states.state, states.normalizer, states.stats)
        ctx.work = work
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, key_gate, output_gate, norm_weight, *states = ctx.saved_tensors
        x = Inputs(query, key, value, key_gate, output_gate)
        gradients = _new_gradients(x)
        d_weight = run_backward(launch, d_out, x, norm_weight, RowStates(*states), ctx.work, gradients)
        return gradients.query, gradients.key, gradients.value, gradients.key_gate, gradients.output_gate, d_weight, None


class _AttendPacked(torch.autograd.Function):
    """The op on one projection, in eager mode: its gradient is written in place of five that would be concatenated."""

    @staticmethod
    def forward(ctx: Any, projection: Tensor, norm_weight: Tensor | None, work: Work, widths: "PackedWidths") -> Tensor:
        out, states = run_forward(launch, widths.unpack(projection), norm_weight, work)
        ctx.save_for_backward(projection, norm_weight, states.state, states.normalizer, states.stats)
        ctx.work, ctx.widths = work, widths
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        projection, norm_weight, *states = ctx.saved_tensors
        d_projection, d_weight = _packed_backward(launch, d_out, projection, norm_weight, RowStates(*states), ctx.work, ctx.widths)
        return d_projection, d_weight, None, None


@dataclass(frozen=True, slots=True)
class PackedWidths:
    """Columns of a projection: query, key, value, then output gate and key gate if there are any; the rest is padding."""

    num_heads: int
    key_dim: int
    value_dim: int
    has_key_gate: bool
    has_output_gate: bool

    @property
    def num_columns(self) -> int:
        """Columns in use."""
        # not times a bool: a compiler may take the width for a symbol
        gates = (self.value_dim if self.has_output_gate else 0) + (1 if self.has_key_gate else 0)
        return self.num_heads * (2 * self.key_dim + self.value_dim + gates)

    def unpack(self, projection: Tensor) -> Inputs:
        """Views of ``projection (L, columns)``."""
        heads, keys, values = self.num_heads, self.num_heads * self.key_dim, self.num_heads * self.value_dim
        query, key, value = projection[:, :keys], projection[:, keys : 2 * keys], projection[:, 2 * keys : 2 * keys + values]
        end = 2 * keys + values
        output_gate = key_gate = None
        if self.has_output_gate:
            output_gate = projection[:, end : end + values].unflatten(1, (heads, self.value_dim))
            end += values
        if self.has_key_gate:
            key_gate = projection[:, end : end + heads]
        shape = (heads, self.key_dim)
        return Inputs(
            query.unflatten(1, shape), key.unflatten(1, shape), value.unflatten(1, (heads, self.value_dim)), key_gate, output_gate
        )


def _packed_backward(
    run: Launcher,
    d_out: Tensor,
    projection: Tensor,
    norm_weight: Tensor | None,
    states: RowStates,
    work: Work,
    widths: PackedWidths,
) -> tuple[Tensor, Tensor | None]:
    if run is traced_launch:
        # a compiler does not take kernels that write into views of one tensor
        gradients = _new_gradients(widths.unpack(projection))
        d_weight = run_backward(run, d_out, widths.unpack(projection), norm_weight, states, work, gradients)
        padding = projection.new_zeros(projection.shape[0], projection.shape[1] - widths.num_columns)
        parts = (gradients.query, gradients.key, gradients.value, gradients.output_gate, gradients.key_gate)
        return torch.cat([*(part.flatten(1) for part in parts if part is not None), padding], dim=1), d_weight
    d_projection = torch.empty(projection.shape, dtype=projection.dtype, device=projection.device)
    if projection.shape[1] > widths.num_columns:
        d_projection[:, widths.num_columns :].zero_()
    d_weight = run_backward(run, d_out, widths.unpack(projection), norm_weight, states, work, widths.unpack(d_projection))
    return d_projection, d_weight


def _new_gradients(x: Inputs) -> Inputs:
    def new(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)

    gates = [None if gate is None else new(gate) for gate in (x.key_gate, x.output_gate)]
    return Inputs(new(x.query), new(x.key), new(x.value), *gates)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    splits: RowSplits,
    feature_map: str,
    normalize: bool,
    eps: float,
) -> Tensor:
    """The Triton op on checked arguments; see ``gbla_kernels.gated_linear_attention``."""
    use_relu = feature_map == "relu"
    query, key, value = _dense(query), _dense(key), _dense(value)
    output_gate = None if output_gate is None else _dense(output_gate)
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    tensors = (query, key, value, key_gate, output_gate, norm_weight)
    for_backward = _is_recorded(*tensors)
    if is_traced(query):
        return gated_linear_attention_op(*tensors, *splits.tensors(), use_relu, normalize, eps, for_backward)[0]  # type: ignore[no-any-return]
    work = _eager_work(splits, query.shape[1], query.shape[2] * value.shape[2], use_relu, normalize, eps, for_backward)
    return _Attend.apply(query, key, value, key_gate, output_gate, norm_weight, work)  # type: ignore[no-any-return, no-untyped-call]


def attend_packed(
    projection: Tensor,
    norm_weight: Tensor | None,
    splits: RowSplits,
    widths: PackedWidths,
    feature_map: str,
    normalize: bool,
    eps: float,
) -> Tensor:
    """The Triton op on one projection; see ``gbla_kernels.gated_linear_attention_packed``."""
    use_relu = feature_map == "relu"
    projection = projection if projection.stride(-1) == 1 else projection.contiguous()
    norm_weight = None if norm_weight is None else norm_weight.contiguous()
    for_backward = _is_recorded(projection, norm_weight)
    if is_traced(projection):
        sizes = (widths.num_heads, widths.key_dim, widths.value_dim, widths.has_key_gate, widths.has_output_gate)
        options = (*sizes, use_relu, normalize, eps, for_backward)
        return gated_linear_attention_packed_op(projection, norm_weight, *splits.tensors(), *options)[0]  # type: ignore[no-any-return]
    work = _eager_work(splits, widths.num_heads, widths.key_dim * widths.value_dim, use_relu, normalize, eps, for_backward)
    return _AttendPacked.apply(projection, norm_weight, work, widths)  # type: ignore[no-any-return, no-untyped-call]


def _is_recorded(*tensors: Tensor | None) -> bool:
    """Whether a backward can come."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _eager_work(
    splits: RowSplits, num_heads: int, state_size: int, use_relu: bool, normalize: bool, eps: float, for_backward: bool
) -> Work:
    num_splits = splits.splits.shape[0]
    output_pieces, key_pieces = (
        min(max(programs // (num_splits * num_heads), 1), MAX_PIECES) for programs in (OUTPUT_PROGRAMS, KEY_PROGRAMS)
    )
    bytes_more = num_splits * num_heads * output_pieces * (splits.most_splits - 1) * 4 * state_size
    # the state of a row's only split is the row's: its readers take it as it is
    fold = FOLD_LIMIT if bytes_more <= FOLD_BYTES else int(splits.fewest_splits == 1)
    is_folded, has = splits.most_splits <= fold, (splits.has_short, splits.has_splits, splits.class_ends)
    return Work(*splits.tensors(), *has, fold, is_folded, output_pieces, key_pieces, use_relu, normalize, eps, for_backward)


def _traced_work(
    short_rows: Tensor, splits: Tensor, slot_offsets: Tensor, use_relu: bool, normalize: bool, eps: float, for_backward: bool = True
) -> Work:
    # no branch on a size that may be symbolic: every kernel is launched, no split is cut, and readers take only single states
    return Work(short_rows, splits, slot_offsets, True, True, None, 1, False, 1, 1, use_relu, normalize, eps, for_backward)


# --- registered ops: functional, of tensors and plain values --------------------------------------------------------------------------


@operator("gated_linear_attention")
def gated_linear_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    short_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    use_relu: bool,
    normalize: bool,
    eps: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, and the states of rows that have splits; exact enough for backward only if ``for_backward``."""
    work = _traced_work(short_rows, splits, slot_offsets, use_relu, normalize, eps, for_backward)
    out, states = run_forward(traced_launch, Inputs(query, key, value, key_gate, output_gate), norm_weight, work)
    return out, states.state, states.normalizer, states.stats


@operator("gated_linear_attention_backward")
def gated_linear_attention_backward_op(
    d_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_gate: Tensor | None,
    output_gate: Tensor | None,
    norm_weight: Tensor | None,
    state: Tensor,
    normalizer: Tensor,
    stats: Tensor,
    short_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    use_relu: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the six tensor inputs, an empty tensor where an input is None."""
    x = Inputs(query, key, value, key_gate, output_gate)
    work = _traced_work(short_rows, splits, slot_offsets, use_relu, normalize, eps)
    gradients = _new_gradients(x)
    d_weight = run_backward(traced_launch, d_out, x, norm_weight, RowStates(state, normalizer, stats), work, gradients)
    optional = [query.new_empty(0) if g is None else g for g in (gradients.key_gate, gradients.output_gate, d_weight)]
    return gradients.query, gradients.key, gradients.value, optional[0], optional[1], optional[2]


@operator("gated_linear_attention_packed")
def gated_linear_attention_packed_op(
    projection: Tensor,
    norm_weight: Tensor | None,
    short_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    has_key_gate: bool,
    has_output_gate: bool,
    use_relu: bool,
    normalize: bool,
    eps: float,
    for_backward: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``gated_linear_attention_op``, on one projection."""
    widths = PackedWidths(num_heads, key_dim, value_dim, has_key_gate, has_output_gate)
    work = _traced_work(short_rows, splits, slot_offsets, use_relu, normalize, eps, for_backward)
    out, states = run_forward(traced_launch, widths.unpack(projection), norm_weight, work)
    return out, states.state, states.normalizer, states.stats


@operator("gated_linear_attention_packed_backward")
def gated_linear_attention_packed_backward_op(
    d_out: Tensor,
    projection: Tensor,
    norm_weight: Tensor | None,
    state: Tensor,
    normalizer: Tensor,
    stats: Tensor,
    short_rows: Tensor,
    splits: Tensor,
    slot_offsets: Tensor,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    has_key_gate: bool,
    has_output_gate: bool,
    use_relu: bool,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of projection and norm_weight, the latter empty if it is None."""
    widths = PackedWidths(num_heads, key_dim, value_dim, has_key_gate, has_output_gate)
    work = _traced_work(short_rows, splits, slot_offsets, use_relu, normalize, eps)
    states = RowStates(state, normalizer, stats)
    d_projection, d_weight = _packed_backward(traced_launch, d_out, projection, norm_weight, states, work, widths)
    return d_projection, projection.new_empty(0) if d_weight is None else d_weight


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tensors = [x for x in inputs if x is None or isinstance(x, Tensor)]
    ctx.save_for_backward(*tensors[:-3], *output[1:], *tensors[-3:])
    # the last is for_backward
    ctx.options = [x for x in inputs if x is not None and not isinstance(x, Tensor)][:-1]
    ctx.is_given = [x is not None for x in tensors[:-3]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(backward_op: Any, ctx: Any, d_out: Tensor | None) -> tuple[Tensor | None, ...]:
    num_others = 3 + len(ctx.options) + 1
    if d_out is None:
        return (None,) * (len(ctx.is_given) + num_others)
    gradients = backward_op(d_out, *ctx.saved_tensors, *ctx.options)
    given = [g if is_given else None for g, is_given in zip(gradients, ctx.is_given, strict=True)]
    return (*given, *(None,) * num_others)


def _op_backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _differentiate(gated_linear_attention_backward_op, ctx, d_out)


def _packed_op_backward(ctx: Any, d_out: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    return _differentiate(gated_linear_attention_packed_backward_op, ctx, d_out)


gated_linear_attention_op.register_autograd(_op_backward, setup_context=_setup)
gated_linear_attention_packed_op.register_autograd(_packed_op_backward, setup_context=_setup)


if INTERPRETED:

    @gated_linear_attention_op.register_fake  # type: ignore[untyped-decorator]
    def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = Inputs(query, key, value, None, None)
        states = new_states(x, rest[5].shape[0] - 1)
        return value.new_empty(value.shape), states.state, states.normalizer, states.stats

    @gated_linear_attention_backward_op.register_fake  # type: ignore[untyped-decorator]
    def _(d_out: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return tuple(d_out.new_empty(0) if x is None else x.new_empty(x.shape) for x in rest[:6])

    @gated_linear_attention_packed_op.register_fake  # type: ignore[untyped-decorator]
    def _(projection: Tensor, norm_weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = PackedWidths(*rest[3:8]).unpack(projection)
        states = new_states(x, rest[2].shape[0] - 1)
        return x.value.new_empty(x.value.shape), states.state, states.normalizer, states.stats

    @gated_linear_attention_packed_backward_op.register_fake  # type: ignore[untyped-decorator]
    def _(d_out: Tensor, projection: Tensor, norm_weight: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        d_weight = projection.new_empty(0) if norm_weight is None else norm_weight.new_empty(norm_weight.shape)
        return projection.new_empty(projection.shape), d_weight
