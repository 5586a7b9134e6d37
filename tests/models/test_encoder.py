"""Laws of the hybrid encoder: rows are independent, order matters only where it should, every ablation runs."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.rotary.reference import rotary_tables, rotate
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import EncoderConfig
from gbla_rec.models import layers
from gbla_rec.models.encoder import HybridEncoder, recency_buckets
from gbla_rec.models.layers import GatedBidirectionalLinearAttention, RMSNorm, SoftmaxAttention

LENGTHS = [0, 5, 1, 0, 37]
BASE = EncoderConfig(model_dim=16, num_heads=2, pattern="SGG", ffn_dim=24)
VARIANTS = {
    "hybrid": {},
    "softmax": {"pattern": "S", "num_repeats": 2},
    "windowed": {"pattern": "W", "window": 3},
    "causal windowed": {"pattern": "W", "window": 3, "direction": "causal"},
    "hybrid with a window": {"pattern": "SWG", "window": 5},
    "linear": {"pattern": "G"},
    "no conv": {"conv": False},
    "no key gate": {"key_gate": False},
    "no output gate": {"output_gate": False},
    "causal": {"direction": "causal"},
    "relu": {"feature_map": "relu"},
    "plain linear attention": {"pattern": "G", "conv": False, "key_gate": False, "output_gate": False},
}
interpreted = pytest.mark.skipif(not INTERPRETED, reason="test_linear_attention_gpu.py runs the kernels on a GPU")


def encoder_of(**changes: object) -> HybridEncoder:
    torch.manual_seed(0)
    return HybridEncoder(dataclasses.replace(BASE, **changes), backend=Backend.REFERENCE).double()


def run(encoder: HybridEncoder, lengths: list[int], values: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of (values, *parameters) of its sum of squares."""
    values = values.detach().requires_grad_()
    layout = JaggedLayout.from_lengths(lengths)
    output = encoder(values, layout.offsets, layout=layout)
    weighting = torch.linspace(-1, 1, output.shape[1], dtype=output.dtype)
    gradients = torch.autograd.grad((output * weighting).sum(), [values, *encoder.parameters()])
    return output.detach(), list(gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_batch_is_each_row_alone(variant: str) -> None:
    encoder = encoder_of(**VARIANTS[variant])
    values = torch.randn(sum(LENGTHS), 16, dtype=torch.float64)
    output, gradients = run(encoder, LENGTHS, values)
    totals = [torch.zeros_like(gradient) for gradient in gradients[1:]]
    for row, (row_values, expected, expected_gradient) in enumerate(
        zip(values.split(LENGTHS), output.split(LENGTHS), gradients[0].split(LENGTHS), strict=True)
    ):
        alone, alone_gradients = run(encoder, [LENGTHS[row]], row_values)
        assert relative_error(expected, alone) < 1e-12
        assert relative_error(expected_gradient, alone_gradients[0]) < 1e-10
        totals = [total + gradient for total, gradient in zip(totals, alone_gradients[1:], strict=True)]
    for (name, _), total, gradient in zip(encoder.named_parameters(), totals, gradients[1:], strict=True):
        assert relative_error(gradient, total) < 1e-9, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_gets_a_gradient_even_from_an_empty_batch(variant: str) -> None:
    encoder = encoder_of(**VARIANTS[variant])
    for lengths in ([0, 0], []):
        output, gradients = run(encoder, lengths, torch.zeros(0, 16, dtype=torch.float64))
        assert output.shape == (0, 16)
        assert all(torch.all(gradient == 0) for gradient in gradients)


@interpreted
@pytest.mark.parametrize("changes", [{"pattern": "SGW"}, {"pattern": "G", "conv": False, "key_gate": False, "output_gate": False}])
def test_triton_encoder_equals_the_reference(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(BASE, **changes)
    reference, fused = (HybridEncoder(config, backend=backend) for backend in (Backend.REFERENCE, Backend.TRITON))
    fused.load_state_dict(reference.state_dict())
    values = torch.randn(sum(LENGTHS), 16)
    expected, actual = run(reference, LENGTHS, values), run(fused, LENGTHS, values)
    assert relative_error(actual[0], expected[0]) < 1e-5
    for (name, _), found, gradient in zip([("values", None), *reference.named_parameters()], actual[1], expected[1], strict=True):
        assert relative_error(found, gradient) < 1e-4, name


@pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter")
@pytest.mark.parametrize(("max_dim", "fused_calls"), [(None, 2), (8, 0)], ids=["fits a program", "too wide"])
def test_triton_fuses_the_norms_of_gbla_with_their_eps(monkeypatch: pytest.MonkeyPatch, max_dim: int | None, fused_calls: int) -> None:
    torch.manual_seed(0)
    reference, triton = (HybridEncoder(dataclasses.replace(BASE, pattern="SGG"), backend=backend) for backend in Backend)
    assert (reference.blocks[0].backend, triton.blocks[0].backend) == (Backend.REFERENCE, Backend.TRITON)
    with torch.no_grad():
        # so small that the eps of a norm matters
        reference.recency.weight.mul_(1e-3)
        for block in reference.blocks:
            block.mixer_norm.weight.normal_()  # type: ignore[operator, union-attr]
    triton.load_state_dict(reference.state_dict())
    calls: list[float] = []
    fused = layers.rms_norm_causal_conv1d

    def counted(*arguments: Tensor, eps: float, **keywords: Any) -> Tensor:
        calls.append(eps)
        return fused(*arguments, eps=eps, **keywords)

    monkeypatch.setattr(layers, "rms_norm_causal_conv1d", counted)
    if max_dim is not None:
        monkeypatch.setattr(layers, "TRITON_MAX_FUSED_NORM_DIM", max_dim)
    values = 1e-3 * torch.randn(sum(LENGTHS), 16)
    expected = run(reference, LENGTHS, values)
    assert calls == [], "the reference keeps norm and convolution apart"
    actual = run(triton, LENGTHS, values)
    assert calls == [reference.blocks[1].mixer_norm.eps] * fused_calls  # type: ignore[union-attr]
    assert relative_error(actual[0], expected[0]) < 1e-5
    for found, gradient in zip(actual[1], expected[1], strict=True):
        assert relative_error(found, gradient) < 1e-4


@pytest.mark.parametrize(("variant", "sees_future"), [("hybrid", True), ("causal", False), ("windowed", True), ("causal windowed", False)])
def test_only_the_bidirectional_encoder_sees_later_events(variant: str, sees_future: bool) -> None:
    encoder = encoder_of(**VARIANTS[variant])
    values = torch.randn(9, 16, dtype=torch.float64)
    changed = values.clone()
    changed[6:] += 1
    before, after = (run(encoder, [9], x)[0] for x in (values, changed))
    assert (relative_error(after[:6], before[:6]) > 1e-6) == sees_future


@pytest.mark.parametrize("direction", ["bidirectional", "causal"])
def test_a_windowed_layer_sees_no_further_than_its_window(direction: str) -> None:
    config = dataclasses.replace(BASE, pattern="W", window=4, direction=direction)
    layer = encoder_of(pattern="W", window=4, direction=direction).blocks[0].mixer
    assert isinstance(layer, SoftmaxAttention)
    x = torch.randn(40, 16, dtype=torch.float64)
    changed = x.clone()
    changed[20] += 1
    layout = JaggedLayout.from_lengths([40])
    is_changed = (layer(changed, layout) - layer(x, layout)).abs().amax(1) > 1e-9
    first = 20 if direction == "causal" else 20 - config.window
    assert is_changed.nonzero().flatten().tolist() == list(range(first, 20 + config.window + 1))


@pytest.mark.parametrize("switch", ["conv", "key_gate", "output_gate"])
def test_each_switch_removes_its_part(switch: str) -> None:
    on, off = encoder_of(pattern="G"), encoder_of(pattern="G", **{switch: False})
    count = [sum(parameter.numel() for parameter in encoder.parameters()) for encoder in (on, off)]
    # a padded projection may keep its width, so parts are compared by what the layer computes
    mixers = [encoder.blocks[0].mixer for encoder in (on, off)]
    assert all(isinstance(mixer, GatedBidirectionalLinearAttention) for mixer in mixers)
    assert count[1] < count[0] or mixers[0].widths != mixers[1].widths  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [Backend.REFERENCE, pytest.param(Backend.TRITON, marks=interpreted)])
@pytest.mark.parametrize("changes", [{"conv": False}, {"conv": False, "key_gate": False}])
def test_linear_attention_without_conv_is_permutation_equivariant(changes: dict[str, object], backend: Backend) -> None:
    torch.manual_seed(0)
    dtype, tolerance = (torch.float32, 1e-5) if backend is Backend.TRITON else (torch.float64, 1e-11)
    layer = GatedBidirectionalLinearAttention(dataclasses.replace(BASE, **changes), backend=backend).to(dtype)
    lengths = [20, 0, 9]
    layout, num_tokens = JaggedLayout.from_lengths(lengths), sum(lengths)
    order = torch.cat([start + torch.randperm(length) for start, length in zip(layout.offsets.tolist(), lengths, strict=False)])
    x, d_output = torch.randn(2, num_tokens, 16, dtype=dtype)

    def outcome(x: Tensor, d_output: Tensor) -> list[Tensor]:
        x = x.requires_grad_()
        output = layer(x, layout)
        return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], d_output)]

    expected, actual = outcome(x, d_output), outcome(x.detach()[order], d_output[order])
    for found, exact in zip(actual, [*(tokens[order] for tokens in expected[:2]), *expected[2:]], strict=True):
        assert relative_error(found, exact) < tolerance


def test_softmax_attention_is_torchs_attention_with_rope() -> None:
    layer = SoftmaxAttention(BASE, backend=Backend.REFERENCE).double()
    x = torch.randn(7, 16, dtype=torch.float64)
    layout = JaggedLayout.from_lengths([7])
    query, key, value = layer.in_projection(x).view(7, 3, 2, 8).unbind(1)
    tables = rotary_tables(layout.positions, 8, BASE.rope_base, torch.float64)
    query, key = rotate(query, *tables), rotate(key, *tables)
    weights = torch.softmax(torch.einsum("thk,shk->hts", query, key) / 8**0.5, dim=-1)
    expected = layer.out_projection(torch.einsum("hts,shk->thk", weights, value).flatten(1))
    assert relative_error(layer(x, layout), expected) < 1e-12


def test_rope_scores_depend_on_the_distance_only() -> None:
    query, key = torch.randn(2, 1, 1, 8)
    scores = []
    for query_position, key_position in ((3, 10), (103, 110)):
        turned = [
            rotate(x, *rotary_tables(torch.tensor([position]), 8, 10_000.0))
            for x, position in ((query, query_position), (key, key_position))
        ]
        scores.append(float((turned[0] * turned[1]).sum()))
    assert abs(scores[0] - scores[1]) < 1e-4


def test_recency_counts_from_the_end_of_each_row() -> None:
    buckets = recency_buckets(JaggedLayout.from_lengths([3, 0, 1]))
    assert buckets.tolist() == [6, 4, 0, 0]
    long = recency_buckets(JaggedLayout.from_lengths([131_072]))
    assert bool((long.diff() <= 0).all())
    assert int(long[0]) == 4 * 17


@pytest.mark.parametrize("part", [HybridEncoder, GatedBidirectionalLinearAttention, SoftmaxAttention])
def test_nobody_gets_the_slow_reference_without_asking_for_it(part: type[torch.nn.Module]) -> None:
    with pytest.raises(TypeError, match="required keyword-only argument: 'backend'"):
        part(BASE)


def test_bad_values_and_offsets_are_named() -> None:
    encoder = HybridEncoder(BASE, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match=r"values must have shape \(L, model_dim\) = \(L, 16\)"):
        encoder(torch.zeros(3, 8), torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"^values must be a tensor, got list \[0\.5\]; torch.as_tensor makes one$"):
        encoder([0.5], torch.tensor([0, 1]))
    for given in ({}, {"layout": JaggedLayout.from_lengths([3])}):
        with pytest.raises(ValueError, match=r"^offsets must be a tensor.*, got list \[0, 3\]; torch.as_tensor makes one"):
            encoder(torch.zeros(3, 16), [0, 3], **given)
    with pytest.raises(ValueError, match=r"^layout must be a JaggedLayout, got Tensor tensor\(\[0, 3\]\); .*from_offsets makes one$"):
        encoder(torch.zeros(3, 16), torch.tensor([0, 3]), layout=torch.tensor([0, 3]))
    with pytest.raises(ValueError, match="offsets must cover values, got 2 tokens in offsets and 3"):
        encoder(torch.zeros(3, 16), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"EncoderConfig.pattern must use the letters"):
        dataclasses.replace(BASE, pattern="SX")
    with pytest.raises(ValueError, match=r"EncoderConfig.window must be positive, got 0"):
        dataclasses.replace(BASE, window=0)


@pytest.mark.parametrize(
    ("lengths", "found"),
    # the number of rows is all that a GPU's offsets tell without a synchronisation
    [([1, 3], r"offsets \[0, 1, 4\] in layout and \[0, 2, 4\]"), ([4], "1 rows and 2 in offsets"), ([2, 2, 0], "3 rows and 2 in offsets")],
)
def test_a_layout_of_other_rows_is_refused(lengths: list[int], found: str) -> None:
    encoder = HybridEncoder(BASE, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match=f"layout must have the rows of offsets, got {found}"):
        encoder(torch.zeros(4, 16), torch.tensor([0, 2, 4]), layout=JaggedLayout.from_lengths(lengths))


def test_a_layout_that_was_left_on_another_device_is_refused() -> None:
    encoder = HybridEncoder(BASE, backend=Backend.REFERENCE)
    with pytest.raises(ValueError, match=r"layout must be on the device of values, got meta and cpu; move it"):
        encoder(torch.zeros(4, 16), torch.tensor([0, 2, 4]), layout=JaggedLayout.from_lengths([2, 2]).to("meta"))


def test_values_of_another_dtype_need_autocast() -> None:
    encoder, offsets = HybridEncoder(BASE, backend=Backend.REFERENCE), torch.tensor([0, 3])
    values = torch.randn(3, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"dtype of the encoder's weights, torch.float32, outside of autocast, got torch.bfloat16"):
        encoder(values, offsets)
    with torch.autocast("cpu", torch.bfloat16):
        assert encoder(values, offsets).isfinite().all()
    assert encoder.bfloat16()(values, offsets).dtype == torch.bfloat16


def test_a_backend_by_its_string_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match=r"backend must be Backend.REFERENCE or Backend.TRITON, got 'triton'"):
        HybridEncoder(BASE, backend="triton")  # type: ignore[arg-type]


def test_norm_keeps_the_dtype_of_its_input_and_one_epsilon() -> None:
    torch.manual_seed(0)
    norm = RMSNorm(64)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(7, 64) * 1e-3
    exact = (x.double() * (x.double().square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).rsqrt()) * norm.weight.double()
    assert norm(x).dtype == torch.float32 and relative_error(norm(x), exact) < 1e-6
    # three roundings to bf16: of x, the weight and the result
    assert norm(x.bfloat16()).dtype == torch.bfloat16 and relative_error(norm(x.bfloat16()), exact) < 3 * 2**-9
