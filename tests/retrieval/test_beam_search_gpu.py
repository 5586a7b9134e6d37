"""On a GPU the search gives the CPU's items, and the host waits for nothing between the first level and the last."""

import pytest
import torch
from torch import Tensor

from gbla_rec.retrieval.beam_search import BeamResult, constrained_beam_search
from gbla_rec.semantic_ids.trie import PrefixTrie

pytestmark = pytest.mark.gpu


def quantised_log_probs(prefixes: Tensor, width: int) -> Tensor:
    """Multiples of 1/4 that depend on user and prefix: sums are exact in fp32, ties are common."""
    users = torch.arange(prefixes.shape[0], device=prefixes.device)[:, None]
    state = users * 7919 + 17
    for level in range(prefixes.shape[2]):
        state = (state * 31 + prefixes[:, :, level] + 1) * 2654435761 % 4294967291
    codes = torch.arange(width, device=prefixes.device)
    return -((state[:, :, None] * 69069 + codes * 40503) % 65521 % 37).float() / 4


def search(trie: PrefixTrie, num_users: int, num_beams: int, denied: Tensor, offsets: Tensor, *, check_nan: bool) -> BeamResult:
    return constrained_beam_search(
        lambda prefixes, _: quantised_log_probs(prefixes.expand(num_users, -1, -1), trie.widths[prefixes.shape[2]]),
        trie, num_users=num_users, num_beams=num_beams, num_results=num_beams,
        denied_items=denied, denied_offsets=offsets, check_nan=check_nan,
    )  # fmt: skip


@pytest.mark.parametrize(("num_users", "num_beams", "num_items", "width"), [(3, 7, 500, 16), (32, 500, 200_000, 512), (5, 600, 300, 8)])
def test_cuda_gives_the_items_and_scores_of_the_cpu_without_waiting(num_users: int, num_beams: int, num_items: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    widths = (width, width, width, 4)
    codes = torch.stack([torch.randint(0, bound, (num_items,), generator=generator) for bound in widths], dim=1)
    trie = PrefixTrie.from_codes(codes, widths)
    denied = torch.randint(0, num_items, (num_users * 100,), generator=generator)
    offsets = torch.arange(num_users + 1) * 100
    expected = search(trie, num_users, num_beams, denied, offsets, check_nan=True)
    on_gpu, denied, offsets = trie.to("cuda"), denied.cuda(), offsets.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = search(on_gpu, num_users, num_beams, denied, offsets, check_nan=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(found.items.cpu(), expected.items)
    assert torch.equal(found.scores.cpu(), expected.scores)
