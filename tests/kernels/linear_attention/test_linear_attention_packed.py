"""The op on one projection gives what it gives on the parts, and one gradient in place of five."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention_packed
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.row_splits import SPLIT
from gbla_kernels.testing.attention_subject import Results, Subject, Tensors, Variant, assert_same_bits, assert_within, results

# where kernels are compiled, "-m gpu" runs these too
pytestmark = [] if INTERPRETED else pytest.mark.gpu

REFERENCE = Subject(backend=Backend.REFERENCE, dtype=torch.float64)
TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, device="cpu" if INTERPRETED else "cuda")
BF16 = replace(TRITON, dtype=torch.bfloat16)
COLUMNS = ("query", "key", "value", "output_gate", "key_gate")
PADDING = 11


def run_packed(subject: Subject, inputs: Tensors, layout: JaggedLayout, has_layout: bool) -> tuple[Results, Tensor]:
    """Results by the names of the parts, and the gradient of the padding, which holds NaN."""
    parts = {name: inputs[name].flatten(1) for name in COLUMNS if inputs[name] is not None}
    padding = inputs["query"].new_full((layout.num_tokens, PADDING), torch.nan)

    def op(projection: Tensor, norm_weight: Tensor | None) -> Tensor:
        return gated_linear_attention_packed(
            *(projection, norm_weight, layout.offsets),
            num_heads=subject.num_heads,
            key_dim=subject.key_dim,
            value_dim=subject.value_dim,
            key_gate=inputs["key_gate"] is not None,
            output_gate=inputs["output_gate"] is not None,
            layout=layout if has_layout else None,
            normalize=subject.variant.normalize,
            feature_map=subject.variant.feature_map,
            backend=subject.backend,
        )

    packed = results(op, {"projection": torch.cat([*parts.values(), padding], dim=1), "norm_weight": inputs["norm_weight"]})
    widths = [part.shape[1] for part in parts.values()]
    *gradients, d_padding = packed.pop("d_projection").split([*widths, PADDING], dim=1)
    packed |= {f"d_{name}": gradient.reshape(inputs[name].shape) for name, gradient in zip(parts, gradients, strict=True)}
    return packed, d_padding


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "subject",
    [
        pytest.param(REFERENCE, id="reference"),
        pytest.param(TRITON, id="triton"),
        # as in training; the interpreter computes bf16 wrongly
        pytest.param(BF16, id="triton-bf16", marks=pytest.mark.skipif(INTERPRETED, reason="needs a GPU")),
    ],
)
@pytest.mark.parametrize(
    "variant",
    [Variant(), Variant(normalize=False, absent=("key_gate",)), Variant(feature_map="relu", absent=("output_gate", "norm_weight"))],
    ids=["full", "no_key_gate", "bare"],
)
def test_packed_projection_equals_its_parts(subject: Subject, variant: Variant) -> None:
    subject = replace(subject, variant=variant)
    inputs, layout = subject.inputs([3, SPLIT + 1, 0, 19], seed=0)
    actual, d_padding = run_packed(subject, inputs, layout, has_layout=True)
    expected = subject.run(inputs, layout)
    if subject.backend is Backend.TRITON:
        assert_same_bits(actual, expected)
    else:
        assert_within(actual, expected, subject.budget(inputs, layout, subject.exact(inputs, layout)))
    assert torch.equal(d_padding, torch.zeros_like(d_padding))


@pytest.mark.parametrize("lengths", [[], [0, 0]])
@pytest.mark.parametrize("subject", [REFERENCE, TRITON], ids=["reference", "triton"])
def test_no_tokens_give_zero_gradients(lengths: list[int], subject: Subject) -> None:
    inputs, layout = subject.inputs(lengths, seed=0)
    actual, _ = run_packed(subject, inputs, layout, has_layout=False)
    assert torch.equal(actual["d_norm_weight"], torch.zeros_like(inputs["norm_weight"]))


def test_too_few_columns_are_named() -> None:
    offsets = torch.tensor([0, 3])
    with pytest.raises(ValueError, match="projection must have at least 32 columns"):
        gated_linear_attention_packed(
            torch.zeros(3, 31), None, offsets, num_heads=1, key_dim=10, value_dim=6, key_gate=False, backend=Backend.REFERENCE
        )
