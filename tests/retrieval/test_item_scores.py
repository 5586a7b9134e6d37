"""Rankings by item-level scores are those of a plain loop, obey deny sets exactly, and tell apart items of one semantic ID."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gbla_rec.retrieval import item_scores
from gbla_rec.retrieval.beam_search import BeamResult
from gbla_rec.retrieval.item_scores import rank_candidates, rank_catalogue

# small integers: products are exact, and ties are common
SMALL = st.integers(-2, 2)


def matrix(rows: int, columns: int) -> st.SearchStrategy[Tensor]:
    return st.lists(SMALL, min_size=rows * columns, max_size=rows * columns).map(
        lambda values: torch.tensor(values, dtype=torch.float32).view(rows, columns)
    )


@st.composite
def catalogues(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[list[int]], int]:
    num_users, num_items = draw(st.integers(0, 4)), draw(st.integers(1, 7))
    denied = [draw(st.lists(st.integers(0, num_items - 1), max_size=num_items + 1)) for _ in range(num_users)]
    return draw(matrix(num_users, 3)), draw(matrix(num_items, 3)), denied, draw(st.integers(1, 9))


def padded(ranked: list[tuple[float, int]], count: int) -> list[int]:
    items = [item for _, item in ranked[:count]]
    return items + [-1] * (count - len(items))


@given(catalogues(), st.integers(1, 30))
def test_the_catalogue_is_ranked_as_by_a_loop_whatever_the_block_of_users(
    case: tuple[Tensor, Tensor, list[list[int]], int], at_once: int
) -> None:
    queries, vectors, denied, num_results = case
    flat = torch.tensor([item for row in denied for item in row], dtype=torch.int64)
    offsets = torch.tensor([0, *[len(row) for row in denied]]).cumsum(0)
    expected = []
    for query, forbidden in zip(queries, denied, strict=True):
        scores = [(-float(query @ vector), item) for item, vector in enumerate(vectors) if item not in forbidden]
        expected.append(padded(sorted(scores), num_results))
    before, item_scores.SCORES_AT_ONCE = item_scores.SCORES_AT_ONCE, at_once
    try:
        found = rank_catalogue(queries, vectors, num_results=num_results, denied_items=flat, denied_offsets=offsets)
    finally:
        item_scores.SCORES_AT_ONCE = before
    assert found.items.shape == (len(queries), num_results)
    assert found.items.tolist() == expected
    for items, scores, query in zip(found.items.tolist(), found.scores.tolist(), queries, strict=True):
        assert scores == [float(query @ vectors[item]) if item >= 0 else -torch.inf for item in items]


@given(st.data(), st.integers(1, 60))
def test_candidates_are_ranked_by_both_scores_whatever_the_block_of_users(data: st.DataObject, at_once: int) -> None:
    num_users, num_items = data.draw(st.integers(0, 3)), data.draw(st.integers(2, 8))
    queries, vectors = data.draw(matrix(num_users, 2)), data.draw(matrix(num_items, 2))
    weight, num_results = data.draw(st.sampled_from([0.0, 0.5, 2.0])), data.draw(st.integers(1, 9))
    # a beam search pads with -1
    beams = BeamResult(torch.full((num_users, num_items + 1), -1), torch.full((num_users, num_items + 1), -torch.inf))
    expected = []
    for user, query in enumerate(queries):
        candidates = data.draw(st.lists(st.integers(0, num_items - 1), unique=True, min_size=1))
        likely = data.draw(st.lists(st.sampled_from([0.0, -1.0, -2.0]), min_size=len(candidates), max_size=len(candidates)))
        beams.items[user, : len(candidates)], beams.scores[user, : len(candidates)] = torch.tensor(candidates), torch.tensor(likely)
        scores = [(-(float(query @ vectors[item]) + weight * log), item) for item, log in zip(candidates, likely, strict=True)]
        expected.append(padded(sorted(scores), num_results))
    before, item_scores.SCORES_AT_ONCE = item_scores.SCORES_AT_ONCE, at_once
    try:
        found = rank_candidates(queries, vectors, beams, beam_weight=weight, num_results=num_results)
    finally:
        item_scores.SCORES_AT_ONCE = before
    assert found.items.tolist() == expected


def test_items_of_one_semantic_id_are_told_apart() -> None:
    beams = BeamResult(torch.tensor([[4, 7]]), torch.tensor([[-1.5, -1.5]]))
    vectors = torch.zeros(8, 2)
    vectors[7, 0] = 1
    found = rank_candidates(torch.tensor([[1.0, 0.0]]), vectors, beams, beam_weight=1.0, num_results=2)
    assert found.items.tolist() == [[7, 4]]


def test_an_item_of_probability_zero_is_a_result_and_ranks_last() -> None:
    beams = BeamResult(torch.tensor([[2, 1]]), torch.tensor([[-torch.inf, -3.0]]))
    found = rank_candidates(torch.ones(1, 2), torch.ones(3, 2), beams, beam_weight=1.0, num_results=3)
    assert found.items.tolist() == [[1, 2, -1]]


def test_scores_are_products_in_fp32_under_autocast_too() -> None:
    # 256 + 1 is not a bf16 number: rounded scores would tie, and the lower index would win
    queries, vectors = torch.tensor([[1.0, 1.0]]), torch.tensor([[256.0, 0.0], [256.0, 1.0]])
    beams = BeamResult(torch.tensor([[0, 1]]), torch.zeros(1, 2))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", torch.bfloat16):
            found = [
                rank_catalogue(queries.to(dtype), vectors.to(dtype), num_results=2),
                rank_candidates(queries.to(dtype), vectors.to(dtype), beams, beam_weight=0.0, num_results=2),
            ]
        for result in found:
            assert result.items.tolist() == [[1, 0]] and result.scores.tolist() == [[257.0, 256.0]]
            assert result.scores.dtype == torch.float32


def test_nan_is_refused_not_ranked() -> None:
    queries, vectors = torch.ones(1, 2), torch.tensor([[1.0, 0.0], [torch.nan, 1.0]])
    with pytest.raises(ValueError, match="got NaN: look for diverged weights"):
        rank_catalogue(queries, vectors, num_results=1)
    # what pads a user's candidates is no score
    beams = BeamResult(torch.tensor([[0, -1]]), torch.tensor([[-1.0, -torch.inf]]))
    assert rank_candidates(queries, vectors, beams, beam_weight=1.0, num_results=2).items.tolist() == [[0, -1]]
    with pytest.raises(ValueError, match="got NaN: look for diverged weights"):
        rank_candidates(queries, vectors, BeamResult(torch.tensor([[0, 1]]), torch.zeros(1, 2)), beam_weight=1.0, num_results=2)
