"""The whole job, and its promise: a published ID never changes."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gbla_rec.config import PrepareConfig, SemanticIdConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare
from gbla_rec.retrieval.beam_search import constrained_beam_search
from gbla_rec.semantic_ids.table import SemanticIdTable
from gbla_rec.semantic_ids.tokenize import append_items, tokenize
from gbla_rec.semantic_ids.trie import PrefixTrie

WORDS = ["red", "blue", "nail", "polish", "shaver", "electric", "head"]
MakeDataset = Callable[..., Any]


def config(**changes: Any) -> SemanticIdConfig:
    small = {"embedding_dim": 4, "num_levels": 2, "codebook_width": 4, "dedup_width": 3, "kmeans_iterations": 4}
    return SemanticIdConfig(**{**small, **changes})


def text_dataset(make_dataset: MakeDataset, item_ids: list[int]) -> Any:
    titles = [f"{WORDS[item % 7]} {WORDS[item % 5]}" if item % 11 else None for item in item_ids]
    return make_dataset(item_ids, {"title": titles})


def codes_by_id(table: SemanticIdTable) -> dict[Any, list[int]]:
    assert table.item_ids is not None
    return dict(zip(table.item_ids.to_list(), table.codes.tolist(), strict=True))


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@given(data=st.data(), dedup_width=st.integers(1, 4))
def test_appending_never_changes_a_published_id(make_dataset: MakeDataset, data: st.DataObject, dedup_width: int) -> None:
    everything = data.draw(st.lists(st.integers(1, 60), min_size=2, max_size=40, unique=True))
    num_old = data.draw(st.integers(1, len(everything)))
    # index 1 (id 1 is text) keeps the first dataset from having no text at all
    old, new = text_dataset(make_dataset, sorted({1, *everything[:num_old]})), text_dataset(make_dataset, sorted({1, *everything}))
    with tempfile.TemporaryDirectory() as name:
        directory, output = Path(name) / "old", Path(name) / "new"
        published = tokenize(old, config(dedup_width=dedup_width), directory)
        before = files_of(directory)
        appended = append_items(directory, new, output)
        assert files_of(directory) == before
        old_codes, codes = codes_by_id(published), codes_by_id(appended)
        assert {item: codes[item] for item in old_codes} == old_codes
        assert appended.widths == published.widths
        assert sorted(codes) == new.item_ids
        # slots are appended: the k-th item of a prefix, published ones first, then by index, has slot k (mod width)
        order = [*old_codes, *(item for item in new.item_ids if item not in old_codes)]
        for place, item in enumerate(order):
            if item not in old_codes:
                earlier = sum(codes[other][:-1] == codes[item][:-1] for other in order[:place])
                assert codes[item][-1] == earlier % dedup_width
        loaded = SemanticIdTable.load(output, num_items=len(new.item_ids), dataset_hash=new.manifest.content_hash)
        assert loaded.content_hash == appended.content_hash


def test_appending_twice_keeps_both_generations(make_dataset: MakeDataset, tmp_path: Path) -> None:
    generations = [list(range(20, 40)), list(range(10, 50)), list(range(1, 60))]
    tables = [tokenize(text_dataset(make_dataset, generations[0]), config(), tmp_path / "0")]
    tables += [append_items(tmp_path / f"{n - 1}", text_dataset(make_dataset, generations[n]), tmp_path / f"{n}") for n in (1, 2)]
    last = codes_by_id(tables[2])
    for table in tables:
        assert {item: last[item] for item in codes_by_id(table)} == codes_by_id(table)
    assert (tmp_path / "0" / "centroids_1.npy").read_bytes() == (tmp_path / "2" / "centroids_1.npy").read_bytes()


def test_tokenizing_twice_gives_the_same_files(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = text_dataset(make_dataset, list(range(1, 60)))
    tables = [tokenize(dataset, config(), tmp_path / name) for name in ("a", "b")]
    assert tables[0].content_hash == tables[1].content_hash
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def test_auto_writes_what_it_chose_and_the_same_files(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = text_dataset(make_dataset, list(range(1, 20)))
    for embedding in ("auto", "text"):
        tokenize(dataset, config(embedding=embedding), tmp_path / embedding)
    assert files_of(tmp_path / "auto") == files_of(tmp_path / "text")
    assert json.loads((tmp_path / "auto" / "semantic_ids.json").read_text())["config"]["embedding"] == "text"


def test_ids_are_unique_while_the_dedup_level_has_room(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = make_dataset(list(range(12)), {"title": ["same words"] * 12})
    roomy = tokenize(dataset, config(dedup_width=12), tmp_path / "roomy")
    assert len(torch.unique(roomy.codes, dim=0)) == 12
    crowded = tokenize(dataset, config(dedup_width=5), tmp_path / "crowded")
    assert len(torch.unique(crowded.codes, dim=0)) == 5
    report = json.loads((tmp_path / "crowded" / "report.json").read_text())
    assert report["before_dedup"]["largest"] == 12
    # 12 items in 5 slots: two of three items, three of two
    assert report["after_dedup"] == {"num_distinct": 5, "num_shared": 5, "items_sharing": 12, "fraction_sharing": 1.0, "largest": 3}


def test_items_alike_get_distinct_last_codes_and_leave_the_dedup_level_to_new_ones(make_dataset: MakeDataset, tmp_path: Path) -> None:
    titles = [f"{WORDS[item % 7]} {WORDS[item % 5]}" for item in range(40)]
    spread = config(codebook_width=16, distinct_last_code=True, balance=1.5, dedup_width=40)
    tables = [tokenize(make_dataset(list(range(40)), {"title": titles}), spread, tmp_path / name) for name in ("a", "b")]
    assert torch.equal(tables[0].codes, tables[1].codes)
    assert not tables[0].codes[:, -1].any() and len(torch.unique(tables[0].codes, dim=0)) == 40
    everything = make_dataset(list(range(41)), {"title": [*titles, titles[0]]})
    appended = append_items(tmp_path / "a", everything, tmp_path / "new")
    assert torch.equal(appended.codes[:40], tables[0].codes)
    assert len(torch.unique(appended.codes, dim=0)) == 41


def test_an_existing_output_is_refused_and_a_failure_leaves_nothing(make_dataset: MakeDataset, tmp_path: Path) -> None:
    dataset = text_dataset(make_dataset, list(range(1, 20)))
    tokenize(dataset, config(), tmp_path / "ids")
    before = files_of(tmp_path / "ids")
    with pytest.raises(FileExistsError, match="delete it or choose another name"):
        tokenize(dataset, config(seed=1), tmp_path / "ids")
    with pytest.raises(ValueError, match="no text columns"):
        tokenize(make_dataset([1, 2]), config(), tmp_path / "other")
    assert files_of(tmp_path / "ids") == before
    assert [path.name for path in tmp_path.iterdir()] == ["ids"]


def test_a_lost_item_another_id_type_and_a_bare_table_are_refused(make_dataset: MakeDataset, tmp_path: Path) -> None:
    tokenize(text_dataset(make_dataset, [1, 2, 3]), config(), tmp_path / "ids")
    with pytest.raises(ValueError, match=r"must hold every item of .*1 are missing: item_id \[2\]"):
        append_items(tmp_path / "ids", text_dataset(make_dataset, [1, 3, 4]), tmp_path / "new")
    with pytest.raises(ValueError, match=r"item_id must be Int64 .* got String"):
        append_items(tmp_path / "ids", make_dataset(["1", "2", "3"], {"title": ["a", "b", "c"]}), tmp_path / "new")
    SemanticIdTable(torch.tensor([[0, 0]]), (2, 2)).save(tmp_path / "bare")
    with pytest.raises(ValueError, match="bare table without codebooks"):
        append_items(tmp_path / "bare", text_dataset(make_dataset, [1, 3, 4]), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_published_ids_stay_though_their_vectors_and_places_change(make_dataset: MakeDataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.save(tmp_path / "old.npy", rng.standard_normal((20, 3)))
    np.save(tmp_path / "new.npy", rng.standard_normal((30, 3)))
    old, new = make_dataset(list(range(20))), make_dataset(list(range(29, -1, -1)))
    published = tokenize(old, config(embedding="file", embedding_file=tmp_path / "old.npy"), tmp_path / "ids")
    appended = append_items(tmp_path / "ids", new, tmp_path / "new", embedding_file=tmp_path / "new.npy")
    assert torch.equal(appended.codes.flip(0)[:20], published.codes)


def test_a_file_of_vectors_is_asked_for_exactly_when_needed(make_dataset: MakeDataset, tmp_path: Path) -> None:
    vectors = np.random.default_rng(0).standard_normal((9, 3))
    np.save(tmp_path / "old.npy", vectors[:6])
    np.save(tmp_path / "new.npy", vectors)
    file_config = config(embedding="file", embedding_file=tmp_path / "old.npy")
    published = tokenize(make_dataset(list(range(6))), file_config, tmp_path / "file")
    with pytest.raises(ValueError, match="embedding_file must be given exactly when"):
        append_items(tmp_path / "file", make_dataset(list(range(9))), tmp_path / "new")
    appended = append_items(tmp_path / "file", make_dataset(list(range(9))), tmp_path / "new", embedding_file=tmp_path / "new.npy")
    assert torch.equal(appended.codes[:6], published.codes)
    tokenize(text_dataset(make_dataset, [1, 2, 3]), config(), tmp_path / "text")
    with pytest.raises(ValueError, match="embedding_file must be given exactly when"):
        append_items(tmp_path / "text", text_dataset(make_dataset, [1, 2, 3]), tmp_path / "no", embedding_file=tmp_path / "new.npy")


@pytest.mark.parametrize("embedding", ["text", "behaviour", "text_and_behaviour"])
def test_a_prepared_dataset_goes_all_the_way_to_generated_items(tmp_path: Path, embedding: Any) -> None:
    rng = np.random.default_rng(0)
    events = {"user_id": np.repeat(np.arange(30), 8), "item_id": rng.integers(100, 130, 240), "timestamp": np.arange(240)}
    pl.DataFrame(events).write_parquet(tmp_path / "events.parquet")
    # items 130 to 134 are in the catalogue but never seen
    titles = [f"{WORDS[item % 7]} {WORDS[item % 3]}" for item in range(35)]
    pl.DataFrame({"item_id": range(100, 135), "title": titles}).write_parquet(tmp_path / "items.parquet")
    prepare(PrepareConfig(name="toy", events=tmp_path / "events.parquet", items=tmp_path / "items.parquet"), tmp_path / "toy")
    dataset = PreparedDataset.open(tmp_path / "toy")
    tokenize(dataset, config(embedding=embedding, codebook_width=None, min_codebook_width=8), tmp_path / "ids")
    table = SemanticIdTable.load(tmp_path / "ids", num_items=35, dataset_hash=dataset.manifest.content_hash)
    assert table.widths == (8, 8, 3) and table.item_ids is not None
    assert table.item_ids.to_list() == list(range(100, 135))
    report = json.loads((tmp_path / "ids" / "report.json").read_text())
    assert report["num_without_embedding"] == (5 if embedding == "behaviour" else 0)
    result = constrained_beam_search(
        lambda prefixes, _: torch.zeros((*prefixes.shape[:2], table.widths[prefixes.shape[2]])),
        PrefixTrie.from_codes(table.codes, table.widths), num_users=2, num_beams=35, num_results=35,
    )  # fmt: skip
    assert sorted(result.items[1].tolist()) == list(range(35))
