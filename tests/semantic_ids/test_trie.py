"""The trie is the table: every prefix of every row and nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from gbla_rec.semantic_ids.trie import PrefixTrie

Table = tuple[list[tuple[int, ...]], tuple[int, ...]]


@st.composite
def tables(draw: st.DrawFn) -> Table:
    widths = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
    row = st.tuples(*(st.integers(0, width - 1) for width in widths))
    return draw(st.lists(row, min_size=1, max_size=25)), widths


def build(table: Table) -> PrefixTrie:
    return PrefixTrie.from_codes(torch.tensor(table[0], dtype=torch.int64), table[1])


def prefixes_by_walking_down(trie: PrefixTrie) -> list[list[tuple[int, ...]]]:
    """The prefix of each node of each level, read from ``child_offsets`` and ``child_tokens`` alone."""
    levels: list[list[tuple[int, ...]]] = [[()]]
    for offsets, tokens in zip(trie.child_offsets, trie.child_tokens, strict=True):
        begins, codes = offsets.tolist(), tokens.tolist()
        children = [(*prefix, codes[child]) for node, prefix in enumerate(levels[-1]) for child in range(begins[node], begins[node + 1])]
        levels.append(children)
    return levels


def assert_same(left: PrefixTrie, right: PrefixTrie) -> None:
    for name, value in vars(left).items():
        other = getattr(right, name)
        pairs = zip(value, other, strict=True) if isinstance(value, tuple) else [(value, other)]
        for mine, theirs in pairs:
            assert torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs, name


@given(table=tables())
@example(table=([(0,)], (1,)))
@example(table=([(3, 3)] * 5, (4, 4)))
def test_nodes_are_exactly_the_prefixes_of_the_table_in_lexicographic_order(table: Table) -> None:
    trie = build(table)
    for length, prefixes in enumerate(prefixes_by_walking_down(trie)):
        assert prefixes == sorted({row[:length] for row in table[0]})
        assert trie.num_nodes(length) == len(prefixes)
        assert trie.num_items_below[length].tolist() == [sum(row[:length] == prefix for row in table[0]) for prefix in prefixes]


@given(table=tables())
def test_leaves_hold_exactly_the_items_with_their_code_in_index_order(table: Table) -> None:
    trie = build(table)
    begins = trie.leaf_item_offsets.tolist()
    for leaf, prefix in enumerate(prefixes_by_walking_down(trie)[-1]):
        items = trie.leaf_items[begins[leaf] : begins[leaf + 1]].tolist()
        assert items == [item for item, row in enumerate(table[0]) if row == prefix]
    assert trie.leaf_items[trie.rank_of_item].tolist() == list(range(len(table[0])))


@given(table=tables())
def test_table_to_trie_and_back_is_the_identity(table: Table) -> None:
    items = torch.arange(len(table[0])).flip(0)
    assert build(table).codes_of_items(items).flip(0).tolist() == [list(row) for row in table[0]]


@given(table=tables())
def test_the_path_of_an_item_leads_through_its_prefixes(table: Table) -> None:
    trie = build(table)
    levels = prefixes_by_walking_down(trie)
    for row, path in zip(table[0], trie.path_of_items(torch.arange(len(table[0]))).tolist(), strict=True):
        assert [levels[length][node] for length, node in enumerate(path)] == [row[:length] for length in range(len(row) + 1)]


@given(table=tables(), data=st.data())
def test_restricting_equals_building_from_the_allowed_rows(table: Table, data: st.DataObject) -> None:
    allowed = data.draw(st.lists(st.integers(0, len(table[0]) - 1), max_size=30))
    restricted = build(table).restrict(torch.tensor(allowed, dtype=torch.int64))
    kept = sorted(set(allowed))
    for length, prefixes in enumerate(prefixes_by_walking_down(restricted)):
        assert prefixes == (sorted({table[0][item][:length] for item in kept}) if length else [()])
    assert sorted(restricted.leaf_items.tolist()) == kept
    assert restricted.codes_of_items(torch.tensor(kept, dtype=torch.int64)).tolist() == [list(table[0][item]) for item in kept]
    assert [item for item in range(len(table[0])) if restricted.rank_of_item[item] >= 0] == kept
    assert_same(restricted, restricted.restrict(restricted.leaf_items))


@given(table=tables())
def test_restricting_to_everything_changes_nothing(table: Table) -> None:
    trie = build(table)
    assert_same(trie, trie.restrict(torch.arange(len(table[0]))))


@given(table=tables())
def test_widest_rows_is_the_room_that_the_fullest_nodes_need(table: Table) -> None:
    trie = build(table)
    for offsets, widest in zip((*trie.child_offsets, trie.leaf_item_offsets), trie.widest_rows, strict=True):
        counts = sorted(offsets.diff().tolist(), reverse=True)
        assert widest.tolist() == [sum(counts[:nodes]) for nodes in range(len(counts) + 1)]


def test_prefix_keys_do_not_overflow_64_bits() -> None:
    # six levels of 2^20 codes: the product is 2^120
    rng = np.random.default_rng(0)
    codes = torch.from_numpy(rng.integers((1 << 20) - 3, 1 << 20, (2_000, 6)))
    trie = PrefixTrie.from_codes(codes, (1 << 20,) * 6)
    assert torch.equal(trie.codes_of_items(torch.arange(2_000)), codes)
    assert trie.num_nodes(6) == len(np.unique(codes.numpy(), axis=0))


def test_a_hundred_thousand_items_round_trip() -> None:
    codes = torch.from_numpy(np.random.default_rng(1).integers(0, 64, (100_000, 4)))
    trie = PrefixTrie.from_codes(codes, (64,) * 4)
    assert torch.equal(trie.codes_of_items(torch.arange(100_000)), codes)


@pytest.mark.gpu
def test_a_trie_moved_to_the_gpu_and_back_is_the_same() -> None:
    trie = build(([(0, 1), (1, 1), (0, 1)], (2, 2)))
    assert trie.to("cuda").device.type == "cuda"
    assert_same(trie, trie.to("cuda").to("cpu"))


@pytest.mark.parametrize(
    ("codes", "widths", "message"),
    [
        (torch.tensor([[0, 2]]), (2, 2), r"codes\[0, 1\] must lie in \[0, 2\), got 2"),
        (torch.tensor([[0, 0], [-1, 0]]), (2, 2), r"codes\[1, 0\] must lie in \[0, 2\), got -1"),
        (torch.tensor([[0, 0]]), (2,), "one positive width per code level"),
        (torch.zeros((1, 0), dtype=torch.int64), (), "one positive width per code level"),
        (torch.tensor([[0, 0]]), (2, 0), "one positive width per code level"),
        (torch.tensor([[0.0]]), (2,), "int64 of shape"),
        (torch.tensor([0]), (2,), "int64 of shape"),
    ],
)
def test_codes_that_are_no_table_are_refused(codes: Tensor, widths: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrefixTrie.from_codes(codes, widths)


def test_items_outside_the_trie_are_refused_by_name() -> None:
    trie = build(([(0, 1), (1, 1), (0, 1)], (2, 2)))
    with pytest.raises(ValueError, match=r"item indices in \[0, 3\), got 7"):
        trie.path_of_items(torch.tensor([1, 7]))
    with pytest.raises(ValueError, match=r"item indices in \[0, 3\), got -1"):
        trie.restrict(torch.tensor([-1]))
    with pytest.raises(ValueError, match="got 1, which is not in its allow set"):
        trie.restrict(torch.tensor([0, 2])).codes_of_items(torch.tensor([0, 1]))
