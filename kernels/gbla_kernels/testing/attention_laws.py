"""Laws of gated linear attention: each is a function that raises AssertionError if the subject breaks it.

``law(subject, lengths, seed)`` draws its inputs from ``seed``. Where a law says *bit for bit* results are compared with ``==``;
elsewhere two results that are equal in exact arithmetic may differ by what each may differ from fp64.
"""

# B rows, L tokens, H heads, K key width, V value width (docs/shapes.md)

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gbla_kernels.backend import Backend
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.attention_subject import (
    FLOOR,
    TOKEN_INPUTS,
    Results,
    Subject,
    Tensors,
    assert_same_bits,
    assert_within,
    output_weights,
)
from gbla_kernels.testing.error_budget import relative_error
from gbla_kernels.testing.inputs import BLOCK

Law = Callable[[Subject, Sequence[int], int], None]
BALLAST = 19
"""Length of a row added where relative errors are compared: some gradients of a single token are zero, or pure rounding."""


def output_and_gradients_equal_fp64(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Within twice the error of the reference that rounds once."""
    assert_near_fp64(subject, *subject.inputs([*lengths, BALLAST], seed))


def assert_near_fp64(subject: Subject, inputs: Tensors, layout: JaggedLayout) -> Results:
    """Compare with the reference in fp64 and return the subject's results."""
    exact = subject.exact(inputs, layout)
    actual = subject.run(inputs, layout)
    assert_within(actual, exact, subject.budget(inputs, layout, exact))
    return actual


def assert_equivalent(subject: Subject, inputs: Tensors, layout: JaggedLayout, actual: Results, d_output: Tensor | None = None) -> None:
    """``actual`` equals the results of ``inputs``, up to the rounding of both; results that it lacks are not compared."""
    expected = subject.run(inputs, layout, d_output=d_output)
    exact = subject.exact(inputs, layout, d_output=d_output)
    budget = subject.budget(inputs, layout, exact, d_output=d_output)
    assert_within(actual, {name: expected[name] for name in actual}, budget, factor=2.0)


def each_row(subject: Subject, tensors: Tensors, layout: JaggedLayout, d_output: Tensor) -> list[Results]:
    """Results of each row as a batch of its own."""
    outcomes = []
    bounds = layout.offsets_cpu.tolist()
    for start, stop in itertools.pairwise(bounds):
        alone = {name: x[start:stop] if x is not None and name in TOKEN_INPUTS else x for name, x in tensors.items()}
        alone_layout = JaggedLayout.from_lengths([stop - start]).to(subject.device)
        outcomes.append(subject.run(alone, alone_layout, d_output=d_output[start:stop]))
    return outcomes


def packed_batch_is_each_row_alone_bit_for_bit(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Outputs and token gradients bit for bit; gradients of parameters add."""
    inputs, layout = subject.inputs(lengths, seed)
    d_output = output_weights(inputs["value"])
    packed = subject.run(inputs, layout, d_output=d_output)
    alone = each_row(subject, inputs, layout, d_output)
    d_weight = packed.pop("d_norm_weight", None)
    for name in packed:
        assert torch.equal(packed[name], torch.cat([row[name] for row in alone])), f"{name}: a row's bits depend on its batch"
    if d_weight is not None:
        total = torch.stack([row["d_norm_weight"].double() for row in alone]).sum(0)
        assert relative_error(d_weight, total) <= 8 * FLOOR[d_weight.dtype], "d_norm_weight: rows do not add up"


def order_of_rows_does_not_matter(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Rows in reverse order give the same bits."""
    inputs, layout = subject.inputs(lengths, seed)
    rows = torch.arange(layout.num_tokens).split(layout.row_lengths)
    order = torch.cat(rows[::-1]).to(subject.device)
    tensors = take_tokens(inputs, order)
    d_output = output_weights(inputs["value"])
    expected = subject.run(inputs, layout, d_output=d_output)
    other_layout = JaggedLayout.from_lengths(list(reversed(lengths))).to(subject.device)
    actual = subject.run(tensors, other_layout, d_output=d_output[order])
    for results in (actual, expected):
        results.pop("d_norm_weight", None)
    assert_same_bits(actual, {name: value[order] for name, value in expected.items()})


def permuting_the_tokens_of_a_row_permutes_the_result(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Bidirectional attention sees a set of tokens."""
    if subject.variant.direction == "causal":
        return
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(layout.num_tokens).split(layout.row_lengths)
    order = torch.cat([row[torch.randperm(len(row), generator=generator)] for row in rows]).to(subject.device)
    d_output = output_weights(inputs["value"])
    permuted = subject.run(take_tokens(inputs, order), layout, d_output=d_output[order])
    back = torch.argsort(order)
    actual = {name: value if name == "d_norm_weight" else value[back] for name, value in permuted.items()}
    assert_equivalent(subject, inputs, layout, actual)


def take_tokens(tensors: Tensors, order: Tensor) -> Tensors:
    """The inputs with their tokens in another order."""
    return {name: x[order] if x is not None and name in TOKEN_INPUTS else x for name, x in tensors.items()}


def adding_a_constant_to_a_rows_gates_changes_nothing(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """One constant per row and head, up to +-4096; gates are multiples of 1/64, so that the sum is exact in fp32."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    gate = inputs["key_gate"]
    if gate is None:
        return
    gate = (gate.to(torch.promote_types(gate.dtype, torch.float32)) * 64).round() / 64
    shifts = torch.randint(-4096, 4097, (layout.num_rows, subject.num_heads), generator=torch.Generator().manual_seed(seed))
    shifted = gate + shifts.to(gate)[layout.rows]
    actual = subject.run({**inputs, "key_gate": shifted}, layout)
    assert_equivalent(subject, {**inputs, "key_gate": gate}, layout, actual)


def no_gate_equals_any_constant_gate(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Absent gates weigh the tokens of a row equally."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    absent = subject.run({**inputs, "key_gate": None}, layout)
    constant = torch.full_like(inputs["query"][..., 0], -2.5)
    assert_equivalent(subject, {**inputs, "key_gate": constant}, layout, absent)


def gate_gradient_sums_to_zero_over_each_row(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Because a constant added to a row's gates changes nothing."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    if inputs["key_gate"] is None:
        return
    gradient = subject.run(inputs, layout)["d_key_gate"].double()
    # the terms that cancel in a row of one token are about as large as the largest gradient
    scale = 1 + float(gradient.abs().max())
    for row in gradient.split(layout.row_lengths):
        tolerance = 16 * FLOOR[subject.dtype] * (scale + row.abs().sum(0))
        assert bool((row.sum(0).abs() <= tolerance).all()), f"d_key_gate sums to {row.sum(0).tolist()} in a row of {len(row)}"


def silenced_token_has_no_influence_but_still_an_output(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """A gate of -inf: whatever key and value are, nothing else changes by a bit."""
    inputs, layout = subject.inputs(lengths, seed, silent_fraction=0.3)
    gate = inputs["key_gate"]
    if gate is None:
        return
    is_silent = (gate == -torch.inf)[..., None]
    other = {**inputs, "key": inputs["key"] + 100 * is_silent, "value": inputs["value"] - 100 * is_silent}
    expected, actual = subject.run(inputs, layout), subject.run(other, layout)
    assert_same_bits(actual, expected)
    for name in ("d_key", "d_value", "d_key_gate"):
        assert bool((expected[name][is_silent[..., 0]] == 0).all()), f"{name} of a silenced token is not zero"


def row_of_silenced_tokens_gives_zeros_and_zero_gradients(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Every other row is silent, and does not disturb its neighbours."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    gate = inputs["key_gate"]
    if gate is None:
        return
    is_silent = (layout.rows + layout.num_rows) % 2 == 0
    results = assert_near_fp64(subject, {**inputs, "key_gate": gate.masked_fill(is_silent[:, None], -torch.inf)}, layout)
    for name, value in results.items():
        assert bool(value.isfinite().all()), f"{name} is not finite"
        if name != "d_norm_weight":
            assert bool((value[is_silent] == 0).all()), f"{name} of a silent row is not zero"


def whole_blocks_and_splits_may_be_silent(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """The first or the last tokens of each row: a whole split or block that leaves some others."""
    inputs, layout = subject.inputs([*lengths, SPLIT + BLOCK + 3], seed)
    gate = inputs["key_gate"]
    if gate is None:
        return
    silent = [max((size for size in (SPLIT, BLOCK) if size + BALLAST <= length), default=0) for length in layout.row_lengths]
    count = torch.tensor(silent, device=gate.device)[layout.rows]
    length = layout.offsets.diff()[layout.rows]
    is_silent = layout.positions < count if seed % 2 else layout.positions >= length - count
    assert_near_fp64(subject, {**inputs, "key_gate": gate.masked_fill(is_silent[:, None], -torch.inf)}, layout)


def gates_far_apart_neither_overflow_nor_vanish(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Gates about -5000, 0 and 5000; fp32, where they still differ by less than one."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    gate = inputs["key_gate"]
    if gate is None:
        return
    choice = torch.randint(-1, 2, gate.shape, generator=torch.Generator().manual_seed(seed))
    gate = gate.to(torch.promote_types(gate.dtype, torch.float32))
    results = assert_near_fp64(subject, {**inputs, "key_gate": gate + 5000 * choice.to(gate)}, layout)
    assert all(bool(value.isfinite().all()) for value in results.values())


def zero_denominator_gives_zero_and_zero_gradients(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """ReLU of negative queries: the token's output is zero and so are its gradients; the others do not notice."""
    subject = replace(subject, variant=replace(subject.variant, feature_map="relu", normalize=True))
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    is_zero = layout.positions % 3 == 1
    query = torch.where(is_zero[:, None, None], -inputs["query"].abs(), inputs["query"])
    results = assert_near_fp64(subject, {**inputs, "query": query}, layout)
    assert all(bool(value.isfinite().all()) for value in results.values())
    assert bool((results["output"][is_zero] == 0).all()) and bool((results["d_query"][is_zero] == 0).all())


def feature_map_keeps_small_values(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """At q = -17, elu(q) + 1 would be 44 % off."""
    subject = replace(subject, variant=replace(subject.variant, feature_map="elu1"))
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    assert_near_fp64(subject, {**inputs, "query": inputs["query"] - 17}, layout)


def tiny_features_neither_overflow_nor_vanish(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Phi is as small as exp(-33): squares and cubes of u and of the denominator leave the range of fp32, the result does not."""
    subject = replace(subject, variant=replace(subject.variant, feature_map="elu1"))
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    query_shift, key_shift = ((30, 0), (30, 30), (20, 20))[seed % 3]
    shifted = {**inputs, "query": inputs["query"].clamp(-3, 3) - query_shift, "key": inputs["key"].clamp(-3, 3) - key_shift}
    exact = subject.exact(shifted, layout)
    # exp(x) is exp2(x log2(e)) in hardware, whose argument is rounded in fp32: a relative error of |x| 2^-24
    argument = (query_shift + key_shift) * 2.0**-24
    budget = {name: bound + argument for name, bound in subject.budget(shifted, layout, exact).items()}
    assert_within(subject.run(shifted, layout), exact, budget)


def linear_in_value_without_the_norm(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """op(v + 2 w) = op(v) + 2 op(w); small integers, so that the sum is exact in every dtype."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    inputs["norm_weight"] = None
    value, other = (4 * inputs["value"]).round(), (4 * inputs["value"].flip(-1)).round()
    op = subject.op(layout)
    combined, first, second = (op(**{**inputs, "value": x}).double() for x in (value + 2 * other, value, other))
    exact = subject.exact({**inputs, "value": value}, layout)
    budget = subject.budget({**inputs, "value": value}, layout, exact)["output"]
    assert relative_error(combined, first + 2 * second) <= 4 * budget


def scaling_value_by_c_and_eps_by_c_squared_changes_no_bit(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """For c a power of two; without the norm the output scales by c instead."""
    inputs, layout = subject.inputs(lengths, seed)
    c = 2.0 ** (1 + seed % 4)
    expected = subject.op(layout, eps=1e-3)(**inputs)
    actual = subject.op(layout, eps=1e-3 * c * c)(**{**inputs, "value": c * inputs["value"]})
    assert torch.equal(actual, expected if inputs["norm_weight"] is not None else c * expected)


def strided_views_equal_contiguous_inputs(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Views of one projection ``(L, columns)`` that is a bit wider, and tensors that are stored head by head."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    tokens = {name: x for name, x in inputs.items() if x is not None and name in TOKEN_INPUTS}
    widths = [x.flatten(1).shape[1] for x in tokens.values()]
    padding = tokens["query"].new_full((layout.num_tokens, -sum(widths) % 64), torch.nan)
    fused = torch.cat([*(x.flatten(1) for x in tokens.values()), padding], dim=1)
    parts = fused.split([*widths, padding.shape[1]], dim=1)
    views = {name: part.unflatten(1, tokens[name].shape[1:]) for name, part in zip(tokens, parts[:-1], strict=True)}
    by_head = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in tokens.items()}
    strided = [subject.run({**inputs, **tensors}, layout) for tensors in (views, by_head)]
    assert_same_where_strides_do_not_count(subject, inputs, layout, strided)


def heads_past_2_to_the_31_elements_equal_contiguous_inputs(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """Tensors that are stored head by head, the last head from element 2**31 on; needs 4 GiB of addresses, of which little is touched."""
    inputs, layout = subject.inputs(lengths, seed)
    d_output = output_weights(inputs["value"]).to(subject.dtype)
    stride, room = 2**31 // (subject.num_heads - 1), 2 * d_output.numel()
    tensors = {**{name: inputs[name] for name in TOKEN_INPUTS}, "d_output": d_output}
    buffer = torch.empty(stride * (subject.num_heads - 1) + room * len(tensors), dtype=subject.dtype, device=subject.device)

    def by_head(x: Tensor, place: int) -> Tensor:
        view = buffer[place * room :].as_strided(x.shape, (x[0, 0].numel(), stride, 1)[: x.dim()])
        return view.copy_(x)

    strided = {name: by_head(x, place) for place, (name, x) in enumerate(tensors.items())}
    d_strided = strided.pop("d_output")
    actual = subject.run({**inputs, **strided}, layout, d_output=d_strided)
    assert_same_bits(actual, subject.run(inputs, layout, d_output=d_output))


def expanded_output_gradient_equals_a_dense_one(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """``y.sum().backward()`` hands over a gradient with strides of zero."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    ones = torch.ones_like(inputs["value"])
    actual = subject.run(inputs, layout, d_output=ones[:1, :1, :1].expand(ones.shape))
    assert_same_where_strides_do_not_count(subject, inputs, layout, [actual], ones)


def assert_same_where_strides_do_not_count(
    subject: Subject, inputs: Tensors, layout: JaggedLayout, results: Sequence[Results], d_output: Tensor | None = None
) -> None:
    """Bit for bit on Triton; the reference calls BLAS, which rounds as strides have it."""
    if subject.backend is Backend.TRITON:
        expected = subject.run(inputs, layout, d_output=d_output)
        for actual in results:
            assert_same_bits(actual, expected)
    else:
        for actual in results:
            assert_equivalent(subject, inputs, layout, actual, d_output)


def same_call_gives_the_same_bits(subject: Subject, lengths: Sequence[int], seed: int) -> None:
    """From run to run, and for what belongs to tokens also with tables that are made on the device."""
    inputs, layout = subject.inputs([*lengths, BALLAST], seed)
    expected = subject.run(inputs, layout)
    assert_same_bits(subject.run(inputs, layout), expected)
    actual = subject.run(inputs, layout, has_layout=False)
    # a sum over another number of rows, some of them empty
    d_weight, expected_d_weight = actual.pop("d_norm_weight", None), expected.pop("d_norm_weight", None)
    assert_same_bits(actual, expected)
    if d_weight is not None and expected_d_weight is not None:
        assert relative_error(d_weight, expected_d_weight) <= 2 * FLOOR[d_weight.dtype], "d_norm_weight: depends on the layout"


LAWS: tuple[Law, ...] = (
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    order_of_rows_does_not_matter,
    permuting_the_tokens_of_a_row_permutes_the_result,
    adding_a_constant_to_a_rows_gates_changes_nothing,
    no_gate_equals_any_constant_gate,
    gate_gradient_sums_to_zero_over_each_row,
    silenced_token_has_no_influence_but_still_an_output,
    row_of_silenced_tokens_gives_zeros_and_zero_gradients,
    whole_blocks_and_splits_may_be_silent,
    gates_far_apart_neither_overflow_nor_vanish,
    zero_denominator_gives_zero_and_zero_gradients,
    feature_map_keeps_small_values,
    tiny_features_neither_overflow_nor_vanish,
    linear_in_value_without_the_norm,
    scaling_value_by_c_and_eps_by_c_squared_changes_no_bit,
    strided_views_equal_contiguous_inputs,
    expanded_output_gradient_equals_a_dense_one,
    same_call_gives_the_same_bits,
)
