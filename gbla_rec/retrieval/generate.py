"""From encoded histories to ranked items: the decoder inside constrained beam search."""

# U users (rows of a batch), M beams (docs/shapes.md)

import functools

import torch
from torch import Tensor

from gbla_kernels import JaggedLayout
from gbla_rec.models.decoder import BeamCache, DecoderMemory
from gbla_rec.models.retriever import GenerativeRetriever
from gbla_rec.retrieval.beam_search import BeamResult, constrained_beam_search
from gbla_rec.semantic_ids.trie import PrefixTrie


@torch.no_grad()
def generate_items(
    retriever: GenerativeRetriever,
    memory: DecoderMemory,
    trie: PrefixTrie,
    *,
    num_beams: int,
    num_results: int,
    denied_items: Tensor | None = None,
    denied_offsets: Tensor | None = None,
) -> BeamResult:
    """Rank items for each row of ``memory`` by the log-probability of their semantic IDs.

    Args:
        retriever: the model, in evaluation mode.
        memory: from ``retriever.encode``.
        trie: the catalogue, or an allowed part of it.
        num_beams: prefixes kept at each level.
        num_results: items per row.
        denied_items: item indices never to return, jagged over rows by ``denied_offsets`` ``(U + 1,)``.
        denied_offsets: see ``denied_items``.

    Returns:
        Items ``(U, num_results)``, -1 where fewer exist, and their log-probabilities.
    """
    return constrained_beam_search(
        _NextLogProbs(retriever, memory),
        trie,
        num_users=memory.layout.num_rows,
        num_beams=num_beams,
        num_results=num_results,
        denied_items=denied_items,
        denied_offsets=denied_offsets,
        device=memory.device,
    )


class _NextLogProbs:
    """The decoder during one search: it keeps what it computed for the beams of the level before."""

    def __init__(self, retriever: GenerativeRetriever, memory: DecoderMemory) -> None:
        self.retriever, self.memory = retriever, memory
        self.cache: BeamCache | None = None

    def __call__(self, prefixes: Tensor, parents: Tensor) -> Tensor:
        """As ``beam_search.NextLogProbs``."""
        num_users, num_beams, _ = prefixes.shape
        layout = beam_layout(num_users, num_beams, prefixes.device)
        log_probs, self.cache = self.retriever.next_log_probs(prefixes, parents, self.cache, layout, self.memory)
        return log_probs


@functools.lru_cache(maxsize=16)
def beam_layout(num_users: int, num_beams: int, device: torch.device) -> JaggedLayout:
    """``num_users`` rows of ``num_beams`` tokens; searches of one size, batch after batch, share what the host makes and copies once."""
    return JaggedLayout.from_lengths([num_beams] * num_users).to(device)
