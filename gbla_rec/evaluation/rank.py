"""Rankings of the users of a split: by a model's beam search, sharded over ranks, or by a baseline."""

# U users, R results per user, S targets of all users (docs/shapes.md)

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.config import EvaluationConfig, ModelConfig, Objective, RunConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import evaluation_batches
from gbla_rec.data.histories import HistoryBatch, flat_ranges
from gbla_rec.evaluation.metrics import ndcg_at_k, recall_at_k
from gbla_rec.models.decoder import DecoderMemory
from gbla_rec.models.retriever import EncodedHistories
from gbla_rec.retrieval.beam_search import BeamResult
from gbla_rec.retrieval.generate import generate_items
from gbla_rec.retrieval.item_scores import rank_candidates, rank_catalogue
from gbla_rec.semantic_ids.trie import PrefixTrie

MAX_BEAM_ROWS = 32_768
"""Beams of all users of a batch: enough to fill a GPU; more only take memory, some 100 kB each at a model width of 384."""
Score = Literal["generative", "item", "joint"]
"""What a model ranks items by; the first one of a result is the model's main score."""
Int64Array = NDArray[np.int64]
Ranker = Callable[[HistoryBatch], Int64Array]
"""Histories of ``U`` users -> items ``(U, R)``, best first, -1 where fewer exist."""


def scores_of(model: ModelConfig) -> tuple[Score, ...]:
    """The scores of a model, the main one first."""
    scores: dict[Objective, tuple[Score, ...]] = {
        "generative": ("generative",),
        "item": ("item",),
        "joint": ("joint", "generative", "item"),
    }
    return scores[model.objective]


@dataclass(frozen=True)
class Search:
    """How a model's ranking is made: the beams of each level, whether items of the own history are left out (exactly), and by what.

    ``only`` one score spares the searches of others; None: all scores of the model.
    """

    num_beams: int
    exclude_history: bool
    only: Score | None = None

    @classmethod
    def of(cls, config: EvaluationConfig) -> "Search":
        """The search whose figures are the main ones, and by which checkpoints are chosen."""
        return cls(config.num_beams, config.exclude_history)


@dataclass(frozen=True)
class RankedUsers:
    """Rankings ``(U, R)`` (-1 where fewer exist) and jagged targets of users in the dataset's order.

    ``history_lengths`` ``(U,)`` counts the events before the targets, also those that are too old to be read.
    """

    user_rows: Int64Array
    ranked: Int64Array
    targets: Int64Array
    target_offsets: Int64Array
    history_lengths: Int64Array

    def metrics(self, cutoffs: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
        """Per-user ``Recall@k`` and ``NDCG@k``, ``(U,)`` each."""
        scores = {f"Recall@{k}": recall_at_k(self.ranked, self.targets, self.target_offsets, k) for k in cutoffs}
        return scores | {f"NDCG@{k}": ndcg_at_k(self.ranked, self.targets, self.target_offsets, k) for k in cutoffs}


def rank_by_main_score(
    parts: RunParts, trie: PrefixTrie, split: Literal["validation", "test"], num_users: int | None = None
) -> RankedUsers:
    """Rank users of ``split`` by the search of the config and the model's main score; all ranks call it together, all get the result."""
    score = scores_of(parts.config.model)[0]
    search = replace(Search.of(parts.config.evaluation), only=score)
    return rank_searches(parts, trie, split, [search], num_users)[search][score]


def rank_searches(
    parts: RunParts, trie: PrefixTrie, split: Literal["validation", "test"], searches: Sequence[Search], num_users: int | None = None
) -> dict[Search, dict[Score, RankedUsers]]:
    """As ``rank_by_main_score`` for several searches and all scores; each history is encoded once.

    Args:
        parts: the run, with trained weights.
        trie: the catalogue.
        split: whose targets are ranked for.
        searches: distinct ones.
        num_users: a fixed random sample of users instead of all.

    Returns:
        For each search, for each score of the model, every user in the dataset's order.
    """
    config = parts.config.evaluation
    num_results = max(config.cutoffs)
    parts.model.eval()
    vectors = parts.item_vectors() if parts.config.model.has_item_head else None
    found: dict[tuple[Search, Score], list[RankedUsers]] = {}
    users_per_batch = users_at_once(parts.config, searches)
    batches = parts.evaluation_batches(split, config.tokens_per_batch, num_users, users_per_batch=users_per_batch, with_queries=False)
    for histories, batch in batches:
        # every rank encodes, empty batch or not: the sharded tables need all ranks
        with parts.autocast():
            encoded = parts.retriever.encode(batch)
            if len(histories.user_rows) == 0:
                continue
            for search in searches:
                for score, result in search_batch(parts, trie, histories, encoded, vectors, search, num_results).items():
                    found.setdefault((search, score), []).append(_ranked(histories, result.items.cpu().numpy()))
    gathered: list[dict[tuple[Search, Score], list[RankedUsers]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    model = parts.config.model
    return {
        search: {
            score: _in_user_order([part for rank in gathered for part in rank.get((search, score), [])], num_results)
            for score in (scores_of(model) if search.only is None else (search.only,))
        }
        for search in searches
    }


def users_at_once(config: RunConfig, searches: Sequence[Search]) -> int:
    """Users of a batch, by the most beams of any of the searches, those that collect the candidates of joint scores among them."""
    is_joint = any((search.only or scores_of(config.model)[0]) == "joint" for search in searches)
    most_beams = max([*(search.num_beams for search in searches), *([config.evaluation.joint_beams] if is_joint else [])])
    return max(MAX_BEAM_ROWS // most_beams, 1)


def search_batch(
    parts: RunParts,
    trie: PrefixTrie,
    histories: HistoryBatch,
    encoded: EncodedHistories,
    vectors: Tensor | None,
    search: Search,
    num_results: int,
) -> dict[Score, BeamResult]:
    """Rank items for one batch by each score of the model, the main one first.

    Args:
        parts: the run, with trained weights, in evaluation mode.
        trie: the catalogue.
        histories: of ``U`` users.
        encoded: the same, encoded.
        vectors: ``(N, D)`` from ``parts.item_vectors``, for a model with an item-level head.
        search: beams, whether the own history is left out, and one score or all.
        num_results: ``R``.
    """
    config = parts.config.evaluation
    wanted = scores_of(parts.config.model) if search.only is None else (search.only,)
    denied = _Denied.of(histories, parts.device) if search.exclude_history else _Denied()
    found: dict[Score, BeamResult] = {}
    if "generative" in wanted:
        assert encoded.memory is not None
        found["generative"] = _beams(parts, trie, encoded.memory, denied, search.num_beams, num_results)
    if "item" in wanted:
        assert encoded.queries is not None and vectors is not None
        found["item"] = rank_catalogue(
            encoded.queries, vectors, num_results=num_results, denied_items=denied.items, denied_offsets=denied.offsets
        )
    if "joint" in wanted:
        assert encoded.memory is not None and encoded.queries is not None and vectors is not None
        num_candidates = max(config.joint_beams, search.num_beams)
        candidates = _beams(parts, trie, encoded.memory, denied, num_candidates, num_candidates)
        found["joint"] = rank_candidates(encoded.queries, vectors, candidates, beam_weight=config.beam_weight, num_results=num_results)
    return {score: found[score] for score in wanted}


@dataclass(frozen=True)
class _Denied:
    """Items that a search must not return, jagged over the users of a batch; none at all by default."""

    items: Tensor | None = None
    offsets: Tensor | None = None

    @classmethod
    def of(cls, histories: HistoryBatch, device: torch.device) -> "_Denied":
        """The items of the users' own histories."""
        return cls(torch.from_numpy(histories.seen_items).to(device), torch.from_numpy(histories.seen_offsets).to(device))


def _beams(parts: RunParts, trie: PrefixTrie, memory: DecoderMemory, denied: _Denied, num_beams: int, num_results: int) -> BeamResult:
    return generate_items(
        parts.retriever,
        memory,
        trie,
        num_beams=num_beams,
        num_results=num_results,
        denied_items=denied.items,
        denied_offsets=denied.offsets,
    )


def rank_with_baseline(
    dataset: PreparedDataset, split: Literal["validation", "test"], ranker: Ranker, num_results: int, num_users: int | None, seed: int
) -> RankedUsers:
    """Rank every user of ``split`` with ``ranker``, which sees the user's whole history before the targets."""
    batches = evaluation_batches(dataset, split, tokens_per_batch=1_000_000, max_history_length=1, num_users=num_users, seed=seed)
    return _in_user_order([_ranked(histories, ranker(histories)) for histories in batches], num_results)


def _ranked(histories: HistoryBatch, ranked: Int64Array) -> RankedUsers:
    # without the histories: the parts travel to every rank
    return RankedUsers(histories.user_rows, ranked, histories.targets, histories.target_offsets, np.diff(histories.seen_offsets))


def _in_user_order(parts: list[RankedUsers], num_results: int) -> RankedUsers:
    """One table of all parts, users in the dataset's order."""

    def joined(of_parts: Iterable[Int64Array], *shape: int) -> Int64Array:
        return np.concatenate([np.zeros((0, *shape), np.int64), *of_parts])

    user_rows = joined(part.user_rows for part in parts)
    order = np.argsort(user_rows, kind="stable")
    num_targets = joined(np.diff(part.target_offsets) for part in parts)
    begins = np.cumsum(num_targets) - num_targets
    places, target_offsets = flat_ranges(begins[order], num_targets[order])
    return RankedUsers(
        user_rows[order],
        joined((part.ranked for part in parts), num_results)[order],
        joined(part.targets for part in parts)[places],
        target_offsets,
        joined(part.history_lengths for part in parts)[order],
    )
