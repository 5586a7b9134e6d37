"""The laws of gated linear attention on a real GPU: all dtypes and widths, long rows, memory that starts as NaN."""

from dataclasses import replace

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.linear_attention.autograd import FOLD_LIMIT
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT
from gbla_kernels.testing.attention_laws import (
    LAWS,
    Law,
    assert_near_fp64,
    heads_past_2_to_the_31_elements_equal_contiguous_inputs,
    output_and_gradients_equal_fp64,
    packed_batch_is_each_row_alone_bit_for_bit,
    same_call_gives_the_same_bits,
)
from gbla_kernels.testing.attention_subject import Subject, Variant, assert_same_bits, assert_within
from gbla_kernels.testing.inputs import BLOCK

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]

BF16 = Subject(backend=Backend.TRITON, dtype=torch.bfloat16, device="cuda", num_heads=3, key_dim=64, value_dim=64)
FP32 = replace(BF16, dtype=torch.float32)
FP16 = replace(BF16, dtype=torch.float16)
LENGTHS = [0, 1, BLOCK - 1, BLOCK, 0, BLOCK + 1, SHORT_LIMIT, SHORT_LIMIT + 3, SPLIT - 1, SPLIT, SPLIT + 1, 3, 2 * SPLIT + 37]
VARIANTS = {
    "full": Variant(),
    "unnormalized": Variant(normalize=False),
    "relu_no_norm": Variant(feature_map="relu", absent=("norm_weight",)),
    "bare": Variant(absent=("key_gate", "output_gate", "norm_weight")),
    "sum": Variant(normalize=False, absent=("output_gate", "norm_weight")),
}


def name_of(law: Law) -> str:
    return law.__name__


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_bf16_obeys(law: Law, variant: Variant) -> None:
    law(replace(BF16, variant=variant), LENGTHS, 1)


@pytest.mark.parametrize("law", LAWS, ids=name_of)
def test_fp32_obeys(law: Law) -> None:
    law(FP32, LENGTHS, 2)


@pytest.mark.parametrize(
    ("subject", "key_dim", "value_dim"),
    [
        *((BF16, *widths) for widths in ((16, 16), (24, 64), (72, 24), (64, 128), (128, 128), (200, 64), (128, 200), (256, 256))),
        *((BF16, *widths) for widths in ((32, 256), (64, 256))),
        *((FP32, *widths) for widths in ((24, 16), (64, 256), (128, 128), (200, 72), (256, 256))),
        *((FP16, *widths) for widths in ((64, 64), (128, 72), (256, 128))),
    ],
    ids=lambda value: str(value.dtype).removeprefix("torch.") if isinstance(value, Subject) else str(value),
)
def test_any_width_and_dtype_is_within_the_error_budget(subject: Subject, key_dim: int, value_dim: int) -> None:
    subject = replace(subject, key_dim=key_dim, value_dim=value_dim)
    output_and_gradients_equal_fp64(subject, LENGTHS, 3)
    same_call_gives_the_same_bits(subject, LENGTHS, 3)


@pytest.mark.parametrize("lengths", [[1, 0, 131_072, 2, SPLIT + 1], [32_768], [2048] * 32], ids=["giant", "long", "packed"])
def test_long_rows_are_within_the_error_budget(lengths: list[int]) -> None:
    output_and_gradients_equal_fp64(replace(BF16, num_heads=2), lengths, 4)


@pytest.mark.parametrize("lengths", [[3, 131_072, 0, 20_000, SPLIT], [SPLIT + 1] * FOLD_LIMIT, [9] * 300], ids=["giant", "split", "tiny"])
def test_long_rows_pack_bit_for_bit(lengths: list[int]) -> None:
    packed_batch_is_each_row_alone_bit_for_bit(replace(BF16, num_heads=2), lengths, 5)


@pytest.mark.parametrize("lengths", [LENGTHS, [SPLIT + 1] * 9, [1, 131_072, 20_000, SPLIT]], ids=["nasty", "folded", "giant"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_is_within_the_error_budget_where_no_gradient_is_recorded(dtype: torch.dtype, lengths: list[int]) -> None:
    subject = replace(BF16, dtype=dtype, num_heads=2)
    inputs, layout = subject.inputs(lengths, seed=11)
    exact = subject.exact(inputs, layout)
    y = {"output": subject.op(layout)(**inputs)}
    assert not y["output"].requires_grad
    assert_within(y, {"output": exact["output"]}, subject.budget(inputs, layout, exact))


@pytest.mark.parametrize("num_heads", [1, 16])
def test_any_number_of_heads(num_heads: int) -> None:
    output_and_gradients_equal_fp64(replace(BF16, num_heads=num_heads), LENGTHS, 6)


@pytest.mark.parametrize("wide", [("key_gate",), ("key_gate", "output_gate", "norm_weight")], ids=["key_gate", "all"])
def test_gates_may_be_wider_than_query(wide: tuple[str, ...]) -> None:
    inputs, layout = BF16.inputs(LENGTHS, seed=7)
    mixed = {name: x.float() if name in wide else x for name, x in inputs.items()}
    outcome = assert_near_fp64(BF16, mixed, layout)
    assert outcome["output"].dtype == torch.bfloat16
    assert all(outcome[f"d_{name}"].dtype == x.dtype for name, x in mixed.items())


def test_gates_may_be_narrower_than_query() -> None:
    inputs, layout = FP32.inputs(LENGTHS, seed=8)
    gates = {name: inputs[name].bfloat16() for name in ("key_gate", "output_gate")}
    outcome = assert_near_fp64(FP32, {**inputs, **gates}, layout)
    assert outcome["output"].dtype == torch.float32 and outcome["d_key_gate"].dtype == torch.bfloat16


@pytest.mark.parametrize("subject", [BF16, FP32], ids=["bf16", "fp32"])
def test_autocast_changes_nothing(subject: Subject) -> None:
    inputs, layout = subject.inputs(LENGTHS, seed=9)
    expected = subject.run(inputs, layout)
    with torch.autocast("cuda", dtype=torch.float16):
        actual = subject.run(inputs, layout)
    assert_same_bits(actual, expected)


def test_offsets_past_2_to_the_31_elements() -> None:
    """The last row starts at element 2**31 of query, key, value and gate; bit for bit a small call on that row."""
    subject = replace(BF16, num_heads=8)
    rows = [131_072] * 33
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    num_tokens = sum(rows)
    inputs = {name: normal(num_tokens, 8, 64) for name in ("query", "key", "value", "output_gate")}
    inputs |= {"key_gate": normal(num_tokens, 8), "norm_weight": normal(8, 64)}
    d_output = normal(num_tokens, 8, 64)
    small_inputs = {name: x if name == "norm_weight" else x[-rows[-1] :].clone() for name, x in inputs.items()}
    large = subject.run(inputs, JaggedLayout.from_lengths(rows).to("cuda"), d_output=d_output)
    small = subject.run(small_inputs, JaggedLayout.from_lengths(rows[-1:]).to("cuda"), d_output=d_output[-rows[-1] :].clone())
    for name in small.keys() - {"d_norm_weight"}:
        assert torch.equal(large[name][-rows[-1] :], small[name]), name


def test_heads_past_2_to_the_31_elements() -> None:
    heads_past_2_to_the_31_elements_equal_contiguous_inputs(replace(BF16, num_heads=17), [3, 0, SPLIT + 5, BLOCK], 10)
