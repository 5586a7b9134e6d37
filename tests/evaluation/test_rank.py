"""One batch is searched by every score of a model: the same items are denied to each, and the joint score is the sum of both others."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gbla_kernels import Backend
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, EvaluationConfig, ModelConfig
from gbla_rec.data.batch import Collator, feature_names
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.evaluation.rank import MAX_BEAM_ROWS, Score, Search, rank_searches, search_batch
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.retriever import GenerativeRetriever
from gbla_rec.retrieval.beam_search import BeamResult
from gbla_rec.semantic_ids.trie import PrefixTrie

NUM_ITEMS, WIDTHS = 24, (4, 3, 3)
EMBEDDING = EmbeddingConfig(rows_per_table=64, dim=8, semantic_code_dim=4)
MODEL = ModelConfig(
    embedding=EMBEDDING,
    encoder=EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16),
    decoder=DecoderConfig(num_heads=2, ffn_dim=16),
    objective="joint",
)
# a user whose history is longer than what is read, and one without any other item left
SEEN = [[3, 4, 5, 6, 7], [9]]


def searched(exclude_history: bool, num_results: int = NUM_ITEMS, only: Score | None = None, **settings: Any) -> dict[Any, BeamResult]:
    torch.manual_seed(0)
    tables = item_tables(EMBEDDING, {}, torch.device("cpu"))
    initialize_tables(tables, 0)
    codes = torch.stack([torch.arange(NUM_ITEMS) // 6, torch.arange(NUM_ITEMS) // 2 % 3, torch.arange(NUM_ITEMS) % 2], dim=1)
    model = GenerativeRetriever(tables, MODEL, feature_names(EMBEDDING), codes, WIDTHS, backend=Backend.REFERENCE).eval()
    read = [row[-3:] for row in SEEN]
    histories = HistoryBatch.of_lengths(
        np.concatenate(read),
        [len(row) for row in read],
        seen_items=np.concatenate(SEEN),
        seen_lengths=[len(row) for row in SEEN],
    )
    collator = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=3)
    items = torch.arange(NUM_ITEMS)
    evaluation = EvaluationConfig(**{"num_beams": 50, "joint_beams": 40, **settings})
    parts: Any = SimpleNamespace(config=SimpleNamespace(evaluation=evaluation, model=MODEL), retriever=model, device=torch.device("cpu"))
    vectors = model.item_vectors(collator.item_features(items), items)
    trie, search = PrefixTrie.from_codes(codes, WIDTHS), Search(evaluation.num_beams, exclude_history, only)
    return search_batch(parts, trie, histories, model.encode(collator(histories)), vectors, search, num_results)


@pytest.mark.parametrize("exclude_history", [True, False])
def test_every_score_denies_the_whole_history_or_none_of_it(exclude_history: bool) -> None:
    found = searched(exclude_history)
    assert list(found) == ["joint", "generative", "item"]
    for score, result in found.items():
        for ranked, seen in zip(result.items.tolist(), SEEN, strict=True):
            wanted = set(range(NUM_ITEMS)) - (set(seen) if exclude_history else set())
            assert set(ranked) - {-1} == wanted and ranked.count(-1) == NUM_ITEMS - len(wanted), score


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_the_joint_score_is_the_item_level_one_and_the_weighted_log_probability(weight: float) -> None:
    found = searched(exclude_history=False, beam_weight=weight)
    by_item = {score: result.scores.gather(1, result.items.argsort(dim=1)) for score, result in found.items()}
    torch.testing.assert_close(by_item["joint"], by_item["item"] + weight * by_item["generative"])
    for result in found.values():
        assert (result.scores.diff(dim=1) <= 0).all()


def test_joint_candidates_are_the_items_of_their_own_number_of_beams() -> None:
    item = searched(False)["item"].items.tolist()
    for joint_beams, num_candidates in ((10, 10), (1, 3), (40, NUM_ITEMS)):
        joint = searched(False, 3, num_beams=3, joint_beams=joint_beams, cutoffs=(2,), beam_weight=0.0)["joint"].items.tolist()
        candidates = searched(False, num_candidates, num_beams=num_candidates, cutoffs=(2,))["generative"].items.tolist()
        expected = [[place for place in order if place in among][:3] for order, among in zip(item, candidates, strict=True)]
        assert joint == expected, joint_beams


def test_one_score_is_found_without_the_searches_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from gbla_rec.evaluation import rank

    beams: list[int] = []
    search_beams = rank.generate_items

    def count(*arguments: Any, **options: Any) -> BeamResult:
        beams.append(options["num_beams"])
        return search_beams(*arguments, **options)

    monkeypatch.setattr(rank, "generate_items", count)
    scores: tuple[Score, ...] = ("joint", "generative", "item")
    whole = searched(False, joint_beams=70)
    assert beams == [50, 70]
    for score, expected in zip(scores, ([70], [50], []), strict=True):
        beams.clear()
        alone = searched(False, only=score, joint_beams=70)
        assert list(alone) == [score] and torch.equal(alone[score].items, whole[score].items)
        assert beams == expected


@pytest.mark.parametrize(
    ("objective", "searches", "most_users"),
    [
        ("generative", [Search(50, False)], MAX_BEAM_ROWS // 50),
        ("joint", [Search(50, False)], MAX_BEAM_ROWS // 200),
        ("joint", [Search(50, False), Search(500, False, "generative")], MAX_BEAM_ROWS // 500),
        ("joint", [Search(50, False, "generative")], MAX_BEAM_ROWS // 50),
        ("generative", [Search(MAX_BEAM_ROWS + 1, False)], 1),
    ],
)
def test_a_batch_has_as_many_users_as_their_beams_allow(objective: Any, searches: list[Search], most_users: int) -> None:
    asked: dict[str, Any] = {}

    def batches(*arguments: Any, **options: Any) -> list[Any]:
        asked.update(options)
        raise StopIteration

    config = SimpleNamespace(evaluation=EvaluationConfig(joint_beams=200), model=dataclasses.replace(MODEL, objective=objective))
    parts: Any = SimpleNamespace(config=config, model=torch.nn.Identity(), item_vectors=lambda: None, evaluation_batches=batches)
    with pytest.raises(StopIteration):
        rank_searches(parts, None, "test", searches)  # type: ignore[arg-type]
    assert asked["users_per_batch"] == most_users
