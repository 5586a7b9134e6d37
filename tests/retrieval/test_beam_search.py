"""Beam search against brute force and against a slow search in plain Python.

The toy model hashes the user and the whole prefix, so a search that mixes up users, beams or prefixes gives other scores.
Oracles add in fp32 in the order of the levels, so comparisons are exact; quantised models make exact ties common.
"""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gbla_rec.retrieval.beam_search import BeamResult, constrained_beam_search
from gbla_rec.semantic_ids.trie import PrefixTrie

MANY = settings(max_examples=3 * settings.default.max_examples)
Scored = list[tuple[int, np.float32]]


def mix(state: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@dataclass(frozen=True)
class HashModel:
    """Log-probabilities that depend on the user and on every code of the prefix."""

    widths: tuple[int, ...]
    seed: int
    quantised: bool
    zero_fraction: float = 0.0

    def table(self, prefixes: np.ndarray) -> np.ndarray:
        """``(U, M, l)`` -> ``(U, M, W_l)`` fp32."""
        users, beams, length = prefixes.shape
        state = np.broadcast_to(self.start(users), (users, beams))
        for level in range(length):
            state = self.after(state, prefixes[:, :, level])
        return self.scores(state, length)

    def start(self, num_users: int) -> np.ndarray:
        """Hash ``(U, 1)`` of each user's empty prefix."""
        return np.arange(num_users, dtype=np.uint64)[:, None] + np.uint64(1 + 1000 * self.seed)

    def after(self, state: np.ndarray, codes: np.ndarray) -> np.ndarray:
        """Hashes of prefixes that one code prolongs."""
        return mix(state * np.uint64(31) + codes.astype(np.uint64) + np.uint64(7))

    def scores(self, state: np.ndarray, level: int) -> np.ndarray:
        """``(U, M)`` hashes -> ``(U, M, W_l)`` fp32."""
        state = mix(state[:, :, None] * np.uint64(31) + np.arange(self.widths[level], dtype=np.uint64))
        uniform = (state >> np.uint64(40)).astype(np.float64) / 2**24
        scores = -np.round(uniform * 3) / 2 if self.quantised else -8 * uniform
        return np.where(mix(state) % np.uint64(1000) < 1000 * self.zero_fraction, -np.inf, scores).astype(np.float32)

    def __call__(self, prefixes: Tensor, parents: Tensor) -> Tensor:
        """All of every prefix, as the oracles read them."""
        return torch.from_numpy(self.table(prefixes.numpy()))

    def next_score(self, num_users: int, user: int, prefix: tuple[int, ...], code: int) -> np.float32:
        prefixes = np.broadcast_to(np.array(prefix, dtype=np.int64), (num_users, 1, len(prefix)))
        return np.float32(self.table(prefixes)[user, 0, code])

    def score(self, num_users: int, user: int, codes: tuple[int, ...]) -> np.float32:
        total = np.float32(0)
        for level, code in enumerate(codes):
            total = np.float32(total + self.next_score(num_users, user, codes[:level], code))
        return total


class Following:
    """The same model, which reads the newest code only and follows parents for what came before."""

    def __init__(self, model: HashModel) -> None:
        self.model, self.state = model, np.zeros((0, 0), dtype=np.uint64)

    def __call__(self, prefixes: Tensor, parents: Tensor) -> Tensor:
        users, _, length = prefixes.shape
        if length == 0:
            self.state = self.model.start(users)
        else:
            self.state = self.model.after(np.take_along_axis(self.state, parents.numpy(), axis=1), prefixes[:, :, -1].numpy())
        return torch.from_numpy(self.model.scores(self.state, length))


@dataclass(frozen=True)
class Case:
    codes: Tensor
    model: HashModel
    denied: list[list[int]]

    @property
    def num_users(self) -> int:
        return len(self.denied)

    def rows(self) -> list[tuple[int, ...]]:
        return [tuple(row) for row in self.codes.tolist()]

    def search(self, num_beams: int, num_results: int, trie: PrefixTrie | None = None) -> BeamResult:
        return constrained_beam_search(
            Following(self.model),
            trie if trie is not None else PrefixTrie.from_codes(self.codes, self.model.widths),
            num_users=self.num_users,
            num_beams=num_beams,
            num_results=num_results,
            denied_items=torch.tensor([item for row in self.denied for item in row], dtype=torch.int64),
            denied_offsets=torch.tensor([0, *np.cumsum([len(row) for row in self.denied])], dtype=torch.int64),
        )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    widths = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
    num_items = draw(st.integers(1, 24))
    seed = draw(st.integers(0, 10_000))
    rng = np.random.default_rng(seed)
    # a power of a uniform number: skewed tries, where some nodes have all children and others one
    skew = draw(st.sampled_from([1.0, 4.0]))
    codes = np.stack([np.floor(width * rng.random(num_items) ** skew) for width in widths], axis=1).astype(np.int64)
    num_users = draw(st.integers(1, 3))
    denied = [draw(st.lists(st.integers(0, num_items - 1), max_size=2 * num_items)) for _ in range(num_users)]
    if draw(st.booleans()):
        denied[0] = list(range(num_items))
    model = HashModel(widths, seed, draw(st.booleans()), draw(st.sampled_from([0.0, 0.3])))
    return Case(torch.from_numpy(codes), model, denied)


def brute_force(case: Case, user: int, allowed: set[int]) -> Scored:
    scored = [(case.model.score(case.num_users, user, row), row, item) for item, row in enumerate(case.rows()) if item in allowed]
    return [(item, score) for score, row, item in sorted(scored, key=lambda entry: (-entry[0], entry[1], entry[2]))]


def slow_beam_search(case: Case, user: int, allowed: set[int], num_beams: int) -> Scored:
    """One user, prefixes as tuples: keep the best ``num_beams`` prefixes that still lead to an allowed item."""
    items_below: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for item, row in enumerate(case.rows()):
        for length in range(len(row) + 1):
            if item in allowed:
                items_below[row[:length]].append(item)
    beams = [((), np.float32(0))] if allowed else []
    for level in range(len(case.model.widths)):
        grown = [
            (prefix, np.float32(score + case.model.next_score(case.num_users, user, parent, prefix[-1])))
            for parent, score in beams
            for prefix in items_below
            if len(prefix) == level + 1 and prefix[:-1] == parent
        ]
        beams = sorted(grown, key=lambda beam: (-beam[1], beam[0]))[:num_beams]
    return [(item, score) for prefix, score in beams for item in items_below[prefix]]


def assert_user_equals(result: BeamResult, user: int, expected: Scored) -> None:
    num_results = result.items.shape[1]
    padding = max(num_results - len(expected), 0)
    assert result.items[user].tolist() == [item for item, _ in expected][:num_results] + [-1] * padding
    assert result.scores[user].tolist() == [float(score) for _, score in expected][:num_results] + [-np.inf] * padding


@MANY
@given(case=cases(), num_results=st.integers(1, 30))
def test_wide_beams_equal_brute_force_over_every_item(case: Case, num_results: int) -> None:
    result = case.search(num_beams=len(case.codes), num_results=num_results)
    for user, denied in enumerate(case.denied):
        assert_user_equals(result, user, brute_force(case, user, set(range(len(case.codes))) - set(denied)))


@MANY
@given(case=cases(), num_beams=st.integers(1, 6), num_results=st.integers(1, 12))
def test_narrow_beams_equal_the_slow_search(case: Case, num_beams: int, num_results: int) -> None:
    result = case.search(num_beams, num_results)
    for user, denied in enumerate(case.denied):
        assert_user_equals(result, user, slow_beam_search(case, user, set(range(len(case.codes))) - set(denied), num_beams))


@MANY
@given(case=cases(), num_beams=st.integers(1, 30), data=st.data())
def test_an_allow_set_and_denied_items_are_both_obeyed(case: Case, num_beams: int, data: st.DataObject) -> None:
    allowed = data.draw(st.lists(st.integers(0, len(case.codes) - 1), max_size=len(case.codes)))
    trie = PrefixTrie.from_codes(case.codes, case.model.widths).restrict(torch.tensor(allowed, dtype=torch.int64))
    result = case.search(num_beams, len(case.codes), trie)
    for user, denied in enumerate(case.denied):
        assert_user_equals(result, user, slow_beam_search(case, user, set(allowed) - set(denied), num_beams))


@MANY
@given(case=cases(), num_beams=st.integers(1, 6))
def test_outputs_are_real_distinct_sorted_and_rescore_to_their_scores(case: Case, num_beams: int) -> None:
    result = case.search(num_beams, len(case.codes) + 3)
    for user, denied in enumerate(case.denied):
        items = [item for item in result.items[user].tolist() if item >= 0]
        scores = result.scores[user].double()[: len(items)]
        assert len(set(items)) == len(items) and not set(items) & set(denied)
        rescored = [
            sum(float(case.model.next_score(case.num_users, user, row[:level], code)) for level, code in enumerate(row))
            for row in (case.rows()[item] for item in items)
        ]
        torch.testing.assert_close(scores, torch.tensor(rescored, dtype=torch.float64), rtol=1e-6, atol=1e-6)
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)
        # pads come last and only last
        assert result.items[user].tolist()[len(items) :] == [-1] * (len(case.codes) + 3 - len(items))
        assert (len(items) > 0) == (set(denied) != set(range(len(case.codes))))


def test_no_denied_arguments_equal_empty_ones() -> None:
    case = Case(torch.tensor([[0, 1], [0, 0], [1, 1], [0, 1]]), HashModel((2, 2), 3, quantised=False), [[], []])
    trie = PrefixTrie.from_codes(case.codes, (2, 2))
    plain = constrained_beam_search(case.model, trie, num_users=2, num_beams=4, num_results=4)
    assert torch.equal(plain.items, case.search(4, 4).items)


def test_ties_go_by_code_then_by_item_index() -> None:
    codes = torch.tensor([[1, 0], [0, 1], [0, 0], [1, 1], [0, 0], [0, 1]])
    trie = PrefixTrie.from_codes(codes, (2, 2))

    def uniform(prefixes: Tensor, _: Tensor) -> Tensor:
        # -0.0 and 0.0 alternate: they are one score
        scores = torch.zeros((*prefixes.shape[:2], 2))
        scores[..., 0] = -0.0
        return scores

    result = constrained_beam_search(uniform, trie, num_users=1, num_beams=4, num_results=6)
    assert result.items.tolist() == [[2, 4, 1, 5, 0, 3]]
    narrow = constrained_beam_search(uniform, trie, num_users=1, num_beams=1, num_results=6)
    assert narrow.items.tolist() == [[2, 4, -1, -1, -1, -1]]


def test_a_dead_prefix_takes_no_beam() -> None:
    codes = torch.tensor([[0, 0], [0, 1], [1, 0]])
    scores = torch.tensor([-0.1, -9.0])
    result = constrained_beam_search(
        lambda prefixes, _: scores.expand(1, prefixes.shape[1], 2),
        PrefixTrie.from_codes(codes, (2, 2)),
        num_users=1, num_beams=1, num_results=1,
        denied_items=torch.tensor([1, 0, 1]), denied_offsets=torch.tensor([0, 3]),
    )  # fmt: skip
    assert result.items.tolist() == [[2]]


def test_an_illegal_code_with_the_only_finite_score_never_wins() -> None:
    trie = PrefixTrie.from_codes(torch.tensor([[0, 1], [2, 1]]), (3, 3))

    def only_illegal(prefixes: Tensor, _: Tensor) -> Tensor:
        scores = torch.full((*prefixes.shape[:2], 3), -torch.inf)
        scores[..., 1 if prefixes.shape[2] == 0 else 0] = 0.0
        return scores

    result = constrained_beam_search(only_illegal, trie, num_users=2, num_beams=8, num_results=3)
    assert result.items.tolist() == [[0, 1, -1]] * 2
    assert result.scores.tolist() == [[-np.inf] * 3] * 2


def test_nan_for_a_legal_code_is_refused_and_for_an_illegal_one_ignored() -> None:
    trie = PrefixTrie.from_codes(torch.tensor([[0], [2]]), (3,))
    illegal = torch.tensor([-1.0, torch.nan, -2.0])
    result = constrained_beam_search(lambda *_: illegal.view(1, 1, 3), trie, num_users=1, num_beams=2, num_results=2)
    assert result.items.tolist() == [[0, 1]]
    legal = torch.tensor([-1.0, -1.0, torch.nan])
    with pytest.raises(ValueError, match="must not return NaN"):
        constrained_beam_search(lambda *_: legal.view(1, 1, 3), trie, num_users=1, num_beams=2, num_results=2)


def test_no_users_and_an_empty_allow_set_give_no_items() -> None:
    trie = PrefixTrie.from_codes(torch.tensor([[0, 1], [1, 1]]), (2, 2))
    model = HashModel((2, 2), 0, quantised=False)
    assert constrained_beam_search(model, trie, num_users=0, num_beams=2, num_results=3).items.shape == (0, 3)
    empty = trie.restrict(torch.tensor([], dtype=torch.int64))
    assert constrained_beam_search(model, empty, num_users=2, num_beams=2, num_results=1).items.tolist() == [[-1], [-1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_beams": 0}, "num_beams must be at least 1, got 0"),
        ({"num_results": 0}, "num_results must be at least 1"),
        ({"num_users": -1}, "num_users must be at least 0"),
        ({"device": "meta"}, "device must be that of the trie"),
        ({"denied_items": torch.tensor([0])}, "given together"),
        ({"denied_items": torch.tensor([2]), "denied_offsets": torch.tensor([0, 1, 1])}, r"denied_items must lie in \[0, 2\)"),
        ({"denied_items": torch.tensor([1]), "denied_offsets": torch.tensor([0, 1])}, "denied_offsets int64 of shape"),
        ({"denied_items": torch.tensor([1]), "denied_offsets": torch.tensor([0, 0, 2])}, "must rise from 0 to 1"),
        ({"next_log_probs": lambda *_: torch.zeros(2, 1, 3)}, "float32 of shape"),
        ({"next_log_probs": lambda *_: torch.zeros(2, 1, 2, dtype=torch.float64)}, "float32 of shape"),
    ],
)
def test_a_malformed_argument_is_named(change: dict[str, object], message: str) -> None:
    trie = PrefixTrie.from_codes(torch.tensor([[0, 1], [1, 1]]), (2, 2))
    arguments = {"next_log_probs": HashModel((2, 2), 0, quantised=False), "num_users": 2, "num_beams": 2, "num_results": 2, **change}
    with pytest.raises(ValueError, match=message):
        constrained_beam_search(arguments.pop("next_log_probs"), trie, **arguments)  # type: ignore[arg-type]
