"""The decoder: teacher forcing and step-by-step decoding agree, nothing leaks between levels, targets or rows."""

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig
from gbla_rec.models.decoder import DecoderMemory, SemanticIdDecoder
from gbla_rec.models.losses import semantic_id_nll

WIDTHS = (6, 5, 4)
MEMORY_LENGTHS = [4, 0, 9]
TARGETS = [2, 1, 3]


def decoder_of(backend: Backend = Backend.REFERENCE) -> SemanticIdDecoder:
    torch.manual_seed(0)
    return SemanticIdDecoder(16, WIDTHS, DecoderConfig(num_heads=2), backend=backend).double()


def random_codes(count: int) -> torch.Tensor:
    return torch.stack([torch.randint(0, width, (count,)) for width in WIDTHS], dim=1)


def remember(decoder: SemanticIdDecoder) -> DecoderMemory:
    return decoder.remember(torch.randn(sum(MEMORY_LENGTHS), 16, dtype=torch.float64), JaggedLayout.from_lengths(MEMORY_LENGTHS))


def code_layout(targets: list[int]) -> JaggedLayout:
    return JaggedLayout.from_lengths([len(WIDTHS) * count for count in targets])


def test_step_by_step_log_probs_equal_teacher_forcing() -> None:
    decoder, codes = decoder_of(), random_codes(6)
    memory = remember(decoder)
    codes_by_row = torch.stack([codes[:2], codes[2:4], codes[4:]])
    logits = decoder(codes, code_layout([2, 2, 2]), memory)
    for level in range(len(WIDTHS)):
        steps = decoder.next_log_probs(codes_by_row[:, :, :level], JaggedLayout.from_lengths([2, 2, 2]), memory)
        expected = torch.log_softmax(logits[level].float(), dim=-1)
        assert relative_error(steps.flatten(0, 1), expected) < 1e-6, level


def test_a_level_sees_earlier_codes_only() -> None:
    decoder, codes = decoder_of(), random_codes(6)
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


def test_targets_and_rows_are_independent() -> None:
    decoder, codes = decoder_of(), random_codes(6)
    memory = remember(decoder)
    together = decoder(codes, code_layout(TARGETS), memory)
    rows = [0, 0, 1, 2, 2, 2]
    for target, row in enumerate(rows):
        start, stop = memory.layout.offsets[row], memory.layout.offsets[row + 1]
        row_memory = DecoderMemory(memory.key_value[start:stop], JaggedLayout.from_lengths([MEMORY_LENGTHS[row]]))
        alone = decoder(codes[target : target + 1], code_layout([1]), row_memory)
        for level in range(len(WIDTHS)):
            assert relative_error(alone[level], together[level][target : target + 1]) < 1e-11


@pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the CPU in Triton's interpreter only")
def test_backends_agree() -> None:
    results = []
    for backend in (Backend.REFERENCE, Backend.TRITON):
        decoder = decoder_of(backend).float()
        layout = JaggedLayout.from_lengths(MEMORY_LENGTHS)
        encoded = torch.randn(sum(MEMORY_LENGTHS), 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        codes = torch.ones(6, len(WIDTHS), dtype=torch.int64)
        loss = semantic_id_nll(decoder(codes, code_layout(TARGETS), decoder.remember(encoded, layout)), codes).sum()
        results.append([loss.detach(), *torch.autograd.grad(loss, [encoded, *decoder.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4


def test_log_probs_of_all_ids_sum_to_one() -> None:
    decoder = decoder_of()
    memory = remember(decoder)
    ids = torch.cartesian_prod(*(torch.arange(width) for width in WIDTHS))
    nll = semantic_id_nll(decoder(ids.repeat(3, 1), code_layout([len(ids)] * 3), memory), ids.repeat(3, 1))
    totals = torch.exp(-nll).view(3, -1).sum(dim=1)
    assert torch.allclose(totals, torch.ones(3), atol=1e-4)


def test_no_targets_give_zero_gradients() -> None:
    decoder = decoder_of()
    memory = remember(decoder)
    loss = semantic_id_nll(decoder(random_codes(0), code_layout([0, 0, 0]), memory), random_codes(0)).sum()
    for gradient in torch.autograd.grad(loss, list(decoder.parameters())):
        assert torch.all(gradient == 0)
