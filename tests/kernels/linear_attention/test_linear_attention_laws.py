"""The laws of gated linear attention, on the reference and on Triton in the interpreter: outputs and every gradient."""

from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention import autograd
from gbla_kernels.linear_attention.autograd import FOLD_BYTES, FOLD_LIMIT
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT, TINY_ROW_LIMITS
from gbla_kernels.testing.attention_laws import (
    LAWS,
    Law,
    adding_a_constant_to_a_rows_gates_changes_nothing,
    gate_gradient_sums_to_zero_over_each_row,
    heads_past_2_to_the_31_elements_equal_contiguous_inputs,
    order_of_rows_does_not_matter,
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    same_call_gives_the_same_bits,
    strided_views_equal_contiguous_inputs,
)
from gbla_kernels.testing.attention_subject import Subject, Variant, assert_same_bits, output_weights, results
from gbla_kernels.testing.inputs import JaggedLengths

REFERENCE = Subject(backend=Backend.REFERENCE, dtype=torch.float64)
TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, num_heads=1)
PLAIN = Variant()
OPTIONAL = ("key_gate", "output_gate", "norm_weight")

bidirectional = st.builds(
    Variant,
    feature_map=st.sampled_from(["elu1", "relu"]),
    normalize=st.booleans(),
    absent=st.lists(st.sampled_from(OPTIONAL), unique=True).map(tuple) | st.just(()),
)
variants = bidirectional | st.builds(Variant, feature_map=st.sampled_from(["elu1", "relu"]), direction=st.just("causal"))
SPLIT_LAWS = (
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    order_of_rows_does_not_matter,
    gate_gradient_sums_to_zero_over_each_row,
    adding_a_constant_to_a_rows_gates_changes_nothing,
    strided_views_equal_contiguous_inputs,
    same_call_gives_the_same_bits,
)


def name_of(law: Law) -> str:
    return law.__name__


# the reference is what fp64 is computed by
of_reference = pytest.mark.parametrize("law", [law for law in LAWS if law is not output_and_gradients_equal_fp64], ids=name_of)
interpreted = pytest.mark.skipif(not INTERPRETED, reason="on a GPU the laws are held by test_linear_attention_gpu.py")


@of_reference
@given(lengths=st.from_type(JaggedLengths), variant=variants, seed=st.integers(0, 7))
@example(lengths=[0, 1, 64, 0, 65], variant=PLAIN, seed=0)
@example(lengths=[1], variant=Variant(feature_map="relu", normalize=False, absent=("norm_weight",)), seed=1)
def test_reference_obeys(law: Law, lengths: list[int], variant: Variant, seed: int) -> None:
    law(replace(REFERENCE, variant=variant), lengths, seed)


@of_reference
@given(lengths=st.from_type(JaggedLengths), variant=variants, seed=st.integers(0, 7))
@settings(max_examples=5)
def test_reference_in_single_precision_obeys(law: Law, lengths: list[int], variant: Variant, seed: int) -> None:
    law(replace(REFERENCE, dtype=torch.float32, variant=variant), lengths, seed)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("law", LAWS, ids=name_of)
@given(lengths=st.from_type(JaggedLengths), variant=bidirectional, seed=st.integers(0, 7))
@example(lengths=[65, 0, 2], variant=PLAIN, seed=1)
@settings(max_examples=2)
def test_triton_obeys_under_the_interpreter(law: Law, lengths: list[int], variant: Variant, seed: int) -> None:
    law(replace(TRITON, variant=variant), lengths, seed)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("law", SPLIT_LAWS, ids=name_of)
def test_triton_obeys_where_rows_are_split(law: Law) -> None:
    law(replace(TRITON, num_heads=2), [3, SPLIT + 1, 0, SPLIT], 2)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "variant", [Variant(normalize=False, absent=("norm_weight",)), Variant(feature_map="relu", absent=OPTIONAL)], ids=["sums", "bare"]
)
def test_triton_splits_rows_in_other_variants(variant: Variant) -> None:
    output_and_gradients_equal_fp64(replace(TRITON, num_heads=2, variant=variant), [3, SPLIT + 1], 4)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("law", [output_and_gradients_equal_fp64, same_call_gives_the_same_bits], ids=name_of)
@pytest.mark.parametrize("variant", [PLAIN, Variant(normalize=False, absent=("norm_weight",))], ids=["full", "sums"])
def test_triton_obeys_at_the_borders_of_the_classes_of_short_rows(law: Law, variant: Variant) -> None:
    law(replace(TRITON, variant=variant), [1, *(limit + more for limit in (*TINY_ROW_LIMITS, SHORT_LIMIT) for more in (0, 1))], 5)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_triton_packs_rows_as_they_are_alone() -> None:
    # alone a row's splits are cut into pieces
    packed_batch_is_each_row_alone_bit_for_bit(replace(TRITON, num_heads=2), [SPLIT + 1] * 5, 3)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
def test_who_adds_up_the_states_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = replace(TRITON, num_heads=2)
    # one split, two and three
    inputs, layout = subject.inputs([SPLIT, SPLIT + 1, 0, 2 * SPLIT + 1], 6)
    d_output = output_weights(inputs["value"])
    by_readers = subject.run(inputs, layout, d_output=d_output)
    # rows of more than one split are combined, of one or more than two
    for limit, size in ((FOLD_LIMIT, -1), (2, FOLD_BYTES)):
        monkeypatch.setattr(autograd, "FOLD_LIMIT", limit)
        monkeypatch.setattr(autograd, "FOLD_BYTES", size)
        assert_same_bits(subject.run(inputs, layout, d_output=d_output), by_readers)


@interpreted
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("key_dim", "value_dim"), [(72, 24), (200, 16), (136, 200)])
def test_triton_takes_any_width(key_dim: int, value_dim: int) -> None:
    output_and_gradients_equal_fp64(replace(TRITON, key_dim=key_dim, value_dim=value_dim), [65, 3], 0)


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_autocast_does_not_change_the_reference(direction: str) -> None:
    subject = replace(REFERENCE, dtype=torch.float32, variant=Variant(direction=direction))
    inputs, layout = subject.inputs([3, 0, 40], 5)
    op = subject.op(layout)

    def op_under_autocast(**tensors: Tensor | None) -> Tensor:
        # forward alone, as in training: autograd runs backward in the dtypes of forward
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return op(**tensors)

    assert_same_bits(results(op_under_autocast, inputs), results(op, inputs))


def test_a_layout_on_another_device_is_refused() -> None:
    inputs, layout = REFERENCE.inputs([3, 4], 0)
    elsewhere = JaggedLayout.from_lengths([3, 4]).to("meta")
    with pytest.raises(ValueError, match=r"on one device, got .*'offsets': 'cpu', 'layout': 'meta'"):
        gated_linear_attention(**inputs, offsets=layout.offsets, layout=elsewhere, backend=Backend.REFERENCE)


@interpreted
@pytest.mark.timeout(120)
def test_triton_addresses_heads_past_2_to_the_31_elements() -> None:
    """Rows of each class, and one that is split; a head's place in 32 bits would read outside of memory."""
    subject = replace(TRITON, dtype=torch.float16, num_heads=3, key_dim=16, value_dim=16)
    heads_past_2_to_the_31_elements_equal_contiguous_inputs(subject, [3, 0, SPLIT + 1, TINY_ROW_LIMITS[-1] + 6], 10)
