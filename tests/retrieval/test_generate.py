"""Beam search through the real decoder equals scoring every item's semantic ID by the training likelihood."""

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig
from gbla_rec.models.losses import semantic_id_nll
from gbla_rec.models.retriever import GenerativeRetriever
from gbla_rec.retrieval.generate import beam_layout, generate_items
from gbla_rec.semantic_ids.trie import PrefixTrie

WIDTHS = (6, 5, 3)
NUM_ITEMS = 50


def small_retriever() -> tuple[GenerativeRetriever, torch.Tensor]:
    """A model and the codes ``(50, 3)`` of its catalogue."""
    torch.manual_seed(0)
    config = ModelConfig(
        embedding=EmbeddingConfig(semantic_code_dim=4), encoder=EncoderConfig(model_dim=16, num_heads=2), decoder=DecoderConfig(num_heads=2)
    )
    ids = torch.cartesian_prod(*(torch.arange(width) for width in WIDTHS))
    # a shared ID among them
    codes = ids[torch.randperm(len(ids))[:NUM_ITEMS]]
    codes[7] = codes[31]
    return GenerativeRetriever(torch.nn.Identity(), config, [], codes, WIDTHS, backend=Backend.REFERENCE).eval(), codes


def test_enough_beams_equal_brute_force_over_the_catalogue() -> None:
    retriever, codes = small_retriever()
    memory = retriever.history.decoder.remember(torch.randn(9, 16), JaggedLayout.from_lengths([4, 0, 5]))
    denied, denied_offsets = torch.tensor([3, 31, 31, 8]), torch.tensor([0, 3, 3, 4])
    result = generate_items(
        retriever,
        memory,
        PrefixTrie.from_codes(codes, WIDTHS),
        num_beams=200,
        num_results=NUM_ITEMS,
        denied_items=denied,
        denied_offsets=denied_offsets,
    )
    with torch.no_grad():
        every = codes.repeat(3, 1)
        logits = retriever.history.decoder(every, JaggedLayout.from_lengths([NUM_ITEMS * len(WIDTHS)] * 3), memory)
        scores = -semantic_id_nll(logits, every).view(3, NUM_ITEMS)
    for row, (start, stop) in enumerate(zip(denied_offsets[:-1].tolist(), denied_offsets[1:].tolist(), strict=True)):
        forbidden = set(denied[start:stop].tolist())
        allowed = [item for item in range(NUM_ITEMS) if item not in forbidden]
        found = [item for item in result.items[row].tolist() if item >= 0]
        assert sorted(found) == allowed
        assert torch.allclose(result.scores[row, : len(found)], scores[row, found], atol=1e-5)
        assert torch.all(result.scores[row, : len(found)].diff() <= 0)


def test_searches_of_one_size_share_the_rows_of_their_beams(monkeypatch: pytest.MonkeyPatch) -> None:
    retriever, codes = small_retriever()
    trie = PrefixTrie.from_codes(codes, WIDTHS)
    beam_layout.cache_clear()
    made: list[int] = []
    from_lengths = JaggedLayout.from_lengths

    def noted(lengths: list[int]) -> JaggedLayout:
        made.append(lengths[0])
        return from_lengths(lengths)

    rows = [from_lengths(lengths) for lengths in ([4, 0, 5], [3, 3, 3], [9, 0])]
    memories = [retriever.history.decoder.remember(torch.randn(9, 16), layout) for layout in rows]
    monkeypatch.setattr(JaggedLayout, "from_lengths", noted)
    for memory, num_new in zip(memories, (3, 0, 3), strict=True):
        before = len(made)
        generate_items(retriever, memory, trie, num_beams=8, num_results=4)
        # of the first level's one prefix, of the six of the second, and of eight
        assert made[before:] == [1, 6, 8][:num_new]
