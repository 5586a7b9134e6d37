"""The decoder: teacher forcing and step-by-step decoding agree, nothing leaks between levels, targets or rows."""

import copy
from typing import Any

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout, keyed_dropout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig
from gbla_rec.models import decoder_layer
from gbla_rec.models.decoder import DecoderMemory, SemanticIdDecoder
from gbla_rec.models.losses import semantic_id_nll

WIDTHS = (6, 5, 4)
MEMORY_LENGTHS = [4, 0, 9]
TARGETS = [2, 1, 3]
of_any_depth = pytest.mark.parametrize("num_layers", [1, 3])


def decoder_of(num_layers: int, backend: Backend = Backend.REFERENCE, dropout: float = 0.0) -> SemanticIdDecoder:
    torch.manual_seed(0)
    config = DecoderConfig(num_heads=2, num_layers=num_layers, dropout=dropout)
    return SemanticIdDecoder(16, WIDTHS, config, backend=backend).double()


def random_codes(count: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, width, (count,)) for width in WIDTHS], dim=1)


def remember(decoder: SemanticIdDecoder) -> DecoderMemory:
    return decoder.remember(torch.randn(sum(MEMORY_LENGTHS), 16, dtype=torch.float64), JaggedLayout.from_lengths(MEMORY_LENGTHS))


def code_layout(targets: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths([len(WIDTHS) * count for count in targets])


@of_any_depth
def test_step_by_step_log_probs_equal_teacher_forcing(num_layers: int) -> None:
    # beams are dropped, doubled and moved from one level to the next, as in a search
    decoder, num_beams, cache = decoder_of(num_layers), (1, 4, 3), None
    memory = remember(decoder)
    prefixes = torch.zeros(3, 1, 0, dtype=torch.int64)
    for level, beams in enumerate(num_beams):
        parents = torch.randint(0, prefixes.shape[1], (3, beams))
        if level > 0:
            newest = torch.randint(0, WIDTHS[level - 1], (3, beams, 1))
            prefixes = torch.cat([prefixes.gather(1, parents[:, :, None].expand(-1, -1, level - 1)), newest], dim=2)
        found, cache = decoder.next_log_probs(prefixes, parents, cache, JaggedLayout.from_lengths([beams] * 3), memory)
        codes = torch.cat([prefixes, torch.zeros(3, beams, len(WIDTHS) - level, dtype=torch.int64)], dim=2).flatten(0, 1)
        expected = torch.log_softmax(decoder(codes, code_layout([beams] * 3), memory)[level].float(), dim=-1)
        assert found.shape == (3, beams, WIDTHS[level])
        assert relative_error(found.flatten(0, 1), expected) < 1e-6, level


def test_log_probs_are_not_rounded_to_bf16_under_autocast() -> None:
    # of 256 codes, bf16 logits would tie some, and the beam's border would go by code
    torch.manual_seed(0)
    decoder = SemanticIdDecoder(16, (256, 4), DecoderConfig(num_heads=2), backend=Backend.REFERENCE)
    layout = JaggedLayout.from_lengths([1])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        memory = decoder.remember(torch.randn(5, 16), JaggedLayout.from_lengths([5]))
        first = torch.zeros(1, 1, 0, dtype=torch.int64)
        found, _ = decoder.next_log_probs(first, torch.zeros(1, 1, dtype=torch.int64), None, layout, memory)
    assert found.dtype == torch.float32 and len(found.unique()) == 256


def test_a_cache_of_another_level_is_refused() -> None:
    decoder = decoder_of(2)
    memory, layout, parents = remember(decoder), JaggedLayout.from_lengths([1, 1, 1]), torch.zeros(3, 1, dtype=torch.int64)
    prefixes = torch.zeros(3, 1, 2, dtype=torch.int64)
    _, cache = decoder.next_log_probs(prefixes[:, :, :0], parents, None, layout, memory)
    for wrong in (None, cache):
        with pytest.raises(ValueError, match=f"cache must be what .* with 2 positions .* got {0 if wrong is None else 1}"):
            decoder.next_log_probs(prefixes, parents, wrong, layout, memory)


@of_any_depth
def test_a_level_sees_earlier_codes_only(num_layers: int) -> None:
    decoder, codes = decoder_of(num_layers), random_codes(6)
    memory = remember(decoder)
    before = decoder(codes, code_layout(TARGETS), memory)
    for level in range(len(WIDTHS)):
        changed = codes.clone()
        changed[:, level:] = (changed[:, level:] + 1) % torch.tensor(WIDTHS[level:])
        after = decoder(changed, code_layout(TARGETS), memory)
        for earlier in range(level + 1):
            assert torch.equal(after[earlier], before[earlier])
        if level + 1 < len(WIDTHS):
            assert not torch.equal(after[level + 1], before[level + 1])


@of_any_depth
def test_targets_and_rows_are_independent(num_layers: int) -> None:
    decoder, codes = decoder_of(num_layers), random_codes(6)
    memory = remember(decoder)
    together = decoder(codes, code_layout(TARGETS), memory)
    rows = [0, 0, 1, 2, 2, 2]
    for target, row in enumerate(rows):
        start, stop = memory.layout.offsets[row], memory.layout.offsets[row + 1]
        key_values = tuple(key_value[start:stop] for key_value in memory.key_values)
        row_memory = DecoderMemory(key_values, JaggedLayout.from_lengths([MEMORY_LENGTHS[row]]))
        alone = decoder(codes[target : target + 1], code_layout([1]), row_memory)
        for level in range(len(WIDTHS)):
            assert relative_error(alone[level], together[level][target : target + 1]) < 1e-11


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the CPU in Triton's interpreter only")
@of_any_depth
def test_backends_agree(num_layers: int) -> None:
    results = []
    for backend in (Backend.REFERENCE, Backend.TRITON):
        decoder = decoder_of(num_layers, backend).float()
        layout = JaggedLayout.from_lengths(MEMORY_LENGTHS)
        encoded = torch.randn(sum(MEMORY_LENGTHS), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        codes = torch.ones(6, len(WIDTHS), dtype=torch.int64)
        loss = semantic_id_nll(decoder(codes, code_layout(TARGETS), decoder.remember(encoded, layout)), codes).sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, [encoded, *decoder.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4


@of_any_depth
def test_log_probs_of_all_ids_sum_to_one(num_layers: int) -> None:
    decoder = decoder_of(num_layers)
    memory = remember(decoder)
    ids = torch.cartesian_prod(*(torch.arange(width) for width in WIDTHS))
    nll = semantic_id_nll(decoder(ids.repeat(3, 1), code_layout([len(ids)] * 3), memory), ids.repeat(3, 1))
    totals = torch.exp(-nll).view(3, -1).sum(dim=1)
    assert torch.allclose(totals, torch.ones(3), atol=1e-4)


@of_any_depth
def test_no_targets_give_zero_gradients(num_layers: int) -> None:
    decoder = decoder_of(num_layers)
    memory = remember(decoder)
    loss = semantic_id_nll(decoder(random_codes(0), code_layout([0, 0, 0]), memory), random_codes(0)).sum()
    for gradient in torch.autograd.grad(loss, list(decoder.parameters())):
        assert torch.all(gradient == 0)


@of_any_depth
def test_gradients_reach_every_parameter_and_every_event(num_layers: int) -> None:
    decoder, layout = decoder_of(num_layers), JaggedLayout.from_lengths(MEMORY_LENGTHS)
    encoded = torch.randn(sum(MEMORY_LENGTHS), 16, dtype=torch.float64, requires_grad=True)
    ids = torch.cartesian_prod(*(torch.arange(width) for width in WIDTHS))
    loss = semantic_id_nll(
        decoder(ids.repeat(3, 1), code_layout([len(ids)] * 3), decoder.remember(encoded, layout)), ids.repeat(3, 1)
    ).sum()
    names, leaves = zip(*decoder.named_parameters(), strict=True)
    *gradients, of_events = torch.autograd.grad(loss, [*leaves, encoded])
    assert all(gradient.abs().max() > 0 for gradient in gradients), [n for n, g in zip(names, gradients, strict=True) if not g.any()]
    assert bool((of_events.abs().amax(dim=1) > 0).all())
    assert len(names) == len(set(names)) == len(set(leaves))


def test_a_decoder_of_one_layer_numbers_no_parameter_and_a_deeper_one_only_those_it_adds() -> None:
    one, three = (dict(decoder_of(num_layers).named_parameters()) for num_layers in (1, 3))
    layer = ["self_norm", "self_projection", "self_output", "cross_norm", "cross_query", "memory_projection", "cross_output", "ffn_norm"]
    layer += ["ffn.in_projection", "ffn.out_projection"]
    around = ["start", "level_embedding", "code_embeddings.0.weight", "code_embeddings.1.weight", "final_norm.weight"]
    around += [f"heads.{level}.weight" for level in range(len(WIDTHS))]
    assert set(one) == {*around, *(f"{part}.weight" for part in layer)}
    assert set(three) - set(one) == {f"further_layers.{index}.{part}.weight" for index in range(2) for part in layer}
    assert all(three[name].shape == parameter.shape for name, parameter in one.items())


def test_layers_of_a_deeper_decoder_add_less_so_that_the_stream_keeps_its_variance() -> None:
    one, four = (decoder_of(num_layers)._layers[0] for num_layers in (1, 4))
    for name in ("self_output", "cross_output"):
        spread = [float(getattr(layer, name).weight.std()) for layer in (one, four)]
        assert spread[1] == pytest.approx(spread[0] / 2, rel=0.2), name


def test_loaded_and_moved_weights_are_those_that_decode() -> None:
    source, codes = decoder_of(3), random_codes(6)
    copied = copy.deepcopy(source)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    loaded = SemanticIdDecoder(16, WIDTHS, source.config, backend=Backend.REFERENCE).to("meta").to_empty(device="cpu").double()
    loaded.load_state_dict(source.state_dict())
    encoded, layout = torch.randn(sum(MEMORY_LENGTHS), 16, dtype=torch.float64), JaggedLayout.from_lengths(MEMORY_LENGTHS)
    expected, found, zeros = (
        decoder(codes, code_layout(TARGETS), decoder.remember(encoded, layout)) for decoder in (source, loaded, copied)
    )
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))
    assert not any(logits.any() for logits in zeros) and all(logits.any() for logits in expected)


def test_no_two_dropouts_share_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = []

    def keep(x: torch.Tensor, keys: torch.Tensor | None, probability: float, salt: int, **options: Any) -> torch.Tensor:
        masks.append(keyed_dropout(torch.ones_like(x), keys, probability, salt, backend=Backend.REFERENCE))
        return keyed_dropout(x, keys, probability, salt, **options)

    monkeypatch.setattr(decoder_layer, "keyed_dropout", keep)
    decoder = decoder_of(3, dropout=0.5)
    decoder(random_codes(6), code_layout(TARGETS), remember(decoder), torch.arange(6) << 20)
    flat = torch.stack(masks).flatten(0, 1)
    assert flat.shape == (3 * 2 * 6 * len(WIDTHS), 16)
    # two rows of 16 coins are equal by chance once in 65,536
    assert len(torch.unique(flat, dim=0)) >= len(flat) - 2
