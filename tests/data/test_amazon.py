"""An Amazon category says the same in each of its published forms, and bad files are named by file and line."""

import dataclasses
import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq
import pytest

from gbla_rec.data import parquet_rows
from gbla_rec.data.amazon import amazon_dataset
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare

DATA_VARIABLE = "GBLA_REC_AMAZON_DATA"
LARGEST = 2**63 - 1
# one event; the same item again; ids that a float or an int32 would change; a user that comes late
SEQUENCES: dict[Any, list[Any]] = {5: [1], 3: [7, 7, 1, 7], LARGEST: [2**53 + 1, 2**53, LARGEST], -2: [1, 2**53, 7, 9, 1, 7, 7]}
TEXT_SEQUENCES: dict[Any, list[Any]] = {"007": ["é", "日本", "é"], "ü": ["7", "😀", "7", "7"], "8": ["7"]}
# digits that no int64 says: a leading zero, one beyond the largest
DIGITS: dict[Any, list[Any]] = {"07": [str(2**63), "7"], "7": ["7"]}


def prepare_path(path: Path, **changes: Any) -> PreparedDataset:
    found = amazon_dataset(path)
    output = path.parent / f"out-{path.name}-{len(list(path.parent.iterdir()))}"
    return prepare(dataclasses.replace(found.config, **changes), output, found.convert)


def write_sequences(directory: Path, sequences: dict[Any, list[Any]]) -> Path:
    directory.mkdir(exist_ok=True)
    pl.DataFrame({"user_id": list(sequences), "items": list(sequences.values())}).write_parquet(directory / "sequences.parquet")
    return directory


def write_text(directory: Path, sequences: dict[Any, list[Any]], name: str = "Beauty") -> Path:
    directory.mkdir(exist_ok=True)
    lines = [" ".join(map(str, [user, *items])) for user, items in sequences.items()]
    (directory / f"{name}.txt").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return directory


def write_gzip(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)


def review(user: str, item: str, time: int) -> str:
    return json.dumps({"reviewerID": user, "asin": item, "unixReviewTime": time, "reviewText": "line\none"}, ensure_ascii=False)


REVIEWS = [
    review("A", "B01", 30),
    review("A", "B02", 20),
    review("B", "B03", 10),
    review("A", "B03", 20),
    review("A", "B01", 20),
    review("C", "B04", 5),
]


def histories(dataset: PreparedDataset) -> dict[Any, list[Any]]:
    items = dataset.items()["item_id"].to_list()
    found = {}
    for shard in dataset.iterate_shards([]):
        for row, user in enumerate(shard.user_ids):
            found[user] = [items[item] for item in shard.items[shard.offsets[row] : shard.offsets[row + 1]]]
    return found


@pytest.mark.parametrize("sequences", [SEQUENCES, TEXT_SEQUENCES, DIGITS], ids=["int64", "string", "digits"])
def test_the_text_form_equals_the_parquet_form(tmp_path: Path, sequences: dict[Any, list[Any]]) -> None:
    text = prepare_path(write_text(tmp_path / "text", sequences))
    parquet = prepare_path(write_sequences(tmp_path / "parquet", sequences))
    assert text.manifest.content_hash == parquet.manifest.content_hash
    assert histories(text) == histories(parquet) == sequences
    assert (text.manifest.num_events, text.manifest.has_timestamps) == (sum(map(len, sequences.values())), False)


def test_conversion_holds_some_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = write_text(tmp_path / "text", SEQUENCES)
    whole = prepare_path(text)
    monkeypatch.setattr(parquet_rows, "ROWS_PER_GROUP", 3)
    found = amazon_dataset(text)
    assert found.convert is not None
    converted = found.convert(found.config, tmp_path).events
    assert pq.ParquetFile(converted).num_row_groups == 2
    assert prepare_path(text).manifest.content_hash == whole.manifest.content_hash


def test_the_last_item_is_the_test_target_and_the_one_before_validates(tmp_path: Path) -> None:
    dataset = prepare_path(write_text(tmp_path / "text", SEQUENCES))
    validation_begin, test_begin, num_events = dataset.read_lengths(0)
    # sorted by user: -2, 3, 5 and the largest; the one event of 5 can only train
    assert num_events.tolist() == [7, 4, 1, 3]
    assert test_begin.tolist() == [6, 3, 1, 2] and validation_begin.tolist() == [5, 2, 1, 1]
    assert (dataset.manifest.num_validation_users, dataset.manifest.num_test_users) == (3, 3)


def test_nameless_attributes_are_words_in_both_forms(tmp_path: Path) -> None:
    attributes = {1: [3, 12], 7: [12], 9: [], LARGEST: [4]}
    text, parquet = write_text(tmp_path / "text", SEQUENCES), write_sequences(tmp_path / "parquet", SEQUENCES)
    # item 2 has no events, so it is not part of the category
    (text / "Beauty_item2attributes.json").write_text(json.dumps(attributes | {2: [3]}))
    empty = [""] * len(attributes)
    items = pl.DataFrame({"item_id": list(attributes), "title": empty, "attribute_ids": [ids or None for ids in attributes.values()]})
    items.write_parquet(parquet / "items.parquet")
    datasets = [prepare_path(text), prepare_path(parquet)]
    for dataset in datasets:
        assert dataset.manifest.text_columns == ("attributes",)
        words = dict(dataset.items().select("item_id", "attributes").rows())
        assert words == {
            1: "attribute3, attribute12",
            7: "attribute12",
            9: None,
            2**53: None,
            2**53 + 1: None,
            LARGEST: "attribute4",
        }
    assert datasets[0].manifest.content_hash == datasets[1].manifest.content_hash


def test_only_columns_with_text_are_text_and_the_title_comes_first(tmp_path: Path) -> None:
    directory = write_sequences(tmp_path / "beauty", {1: [1, 2, 3]})
    columns = {
        "item_id": [1, 2, 3],
        "asin": ["B1", "B2", "B3"],
        "short_text": ["", None, "  "],
        "keywords": ["", "süß", None],
        "title": [None, None, "日本 ✂"],
        "attribute_ids": [[1], [], None],
        "attributes": [["A", "B"], [], None],
    }
    pl.DataFrame(columns).write_parquet(directory / "items.parquet")
    dataset = prepare_path(directory)
    assert dataset.manifest.text_columns == ("title", "attributes")
    assert dataset.items().select("title", "attributes").rows() == [
        (None, "A, B"),
        (None, ""),
        ("日本 ✂", None),
    ]


@pytest.mark.parametrize(
    "items",
    [None, {"item_id": [1, 2, 3]}, {"item_id": [1, 2, 3], "asin": ["x"] * 3, "title": [""] * 3, "attributes": [[], None, [""]]}],
    ids=["no table", "ids only", "empty text"],
)
def test_a_category_without_any_text_prepares(tmp_path: Path, items: dict[str, Any] | None) -> None:
    directory = write_sequences(tmp_path / "toys", {1: [1, 2, 3]})
    if items is not None:
        pl.DataFrame(items).write_parquet(directory / "items.parquet")
    dataset = prepare_path(directory)
    assert (dataset.manifest.text_columns, dataset.manifest.num_items) == ((), 3)


def test_reviews_are_ordered_by_time_and_then_by_their_place(tmp_path: Path) -> None:
    write_gzip(tmp_path / "raw" / "reviews_Toys_and_Games_5.json.gz", REVIEWS)
    dataset = prepare_path(tmp_path / "raw")
    assert histories(dataset) == {"A": ["B02", "B03", "B01", "B01"], "B": ["B03"], "C": ["B04"]}
    assert (dataset.manifest.name, dataset.manifest.text_columns) == ("amazon_toys_and_games", ())
    assert dataset.manifest.source["events"].endswith("reviews_Toys_and_Games_5.json.gz")


def test_products_are_described_by_literals_and_only_those_with_reviews(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_gzip(tmp_path / "raw" / "reviews_Beauty_5.json.gz", REVIEWS)
    products = [
        {"asin": "B02", "title": 'Crème "brûlée" &amp; 日本', "categories": [["Beauty", "Nails"], ["Beauty", "Hair"]], "price": 1.5},
        {"asin": "never reviewed", "title": "x"},
        {"asin": "B01", "brand": "O'Brien", "related": {"also_bought": ["B02"]}, "description": "a long text"},
        {"asin": "B03", "title": "", "brand": "", "categories": []},
    ]
    write_gzip(tmp_path / "raw" / "meta_Beauty.json.gz", [repr(product) for product in products])
    with caplog.at_level(logging.WARNING):
        dataset = prepare_path(tmp_path / "raw")
    assert "1 of 4 items of the log" in caplog.text and "'B04'" in caplog.text
    assert dataset.manifest.text_columns == ("title", "brand", "categories")
    assert dataset.items().drop("item_index", "num_train_events").rows() == [
        ("B01", None, "O'Brien", ""),
        ("B02", 'Crème "brûlée" & 日本', None, "Beauty, Nails, Hair"),
        ("B03", None, None, ""),
        ("B04", None, None, None),
    ]


def test_a_description_that_is_code_is_refused_and_never_run(tmp_path: Path) -> None:
    write_gzip(tmp_path / "raw" / "reviews_Beauty_5.json.gz", REVIEWS)
    trap = tmp_path / "trap"
    write_gzip(tmp_path / "raw" / "meta_Beauty.json.gz", ["{'asin': 'B01'}", f"__import__('pathlib').Path({str(trap)!r}).touch()"])
    with pytest.raises(ValueError, match=r"meta_Beauty.json.gz, line 2: not a Python dict literal"):
        prepare_path(tmp_path / "raw")
    assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("Beauty.txt", b"1 2 3\n\n7\n", ["line 3", "user without items"]),
        ("Beauty.txt", b"1 2\n2 3\n1 4\n", ["line 3", "user '1'", "line already, 1"]),
        ("Beauty.txt", b"1 2\n2 \xff\n", ["line 2", "utf-8"]),
        ("Beauty.txt", b"\n", ["no sequences"]),
        ("Beauty_item2attributes.json", b'{"1": [2],\n "2": }', ["line 2", "not JSON"]),
        ("Beauty_item2attributes.json", b"[1]", ["JSON object", "list"]),
        ("Beauty_item2attributes.json", b'{"2": 3}', ["item '2'", "must be a list"]),
        ("reviews_Beauty_5.json", b'{"reviewerID": "A", "asin": "B", "unixReviewTime": 1}\nnot json\n', ["line 2", "not a JSON object"]),
        ("reviews_Beauty_5.json", b'{"reviewerID": "A", "unixReviewTime": 1}\n', ["line 1", "asin must be str"]),
        ("reviews_Beauty_5.json", b'{"reviewerID": "A", "asin": "B", "unixReviewTime": "1"}\n', ["line 1", "unixReviewTime must be int"]),
        ("reviews_Beauty_5.json", b"[1]\n", ["line 1", "reviewerID"]),
        ("reviews_Beauty_5.json.gz", gzip.compress("\n".join(REVIEWS).encode())[:-9], ["gzip", "truncated"]),
        ("reviews_Beauty_5.json.gz", "\n".join(REVIEWS).encode(), ["gzip"]),
        ("meta_Beauty.json", b"{'asin': 'B01'}\n{'asin': \n", ["line 2", "literal"]),
        ("meta_Beauty.json", b"{'asin': 'B01'}\n{'asin': 'B02'}\n{'asin': 'B01'}\n", ["line 3", "'B01'", "already in line 1"]),
        ("meta_Beauty.json", b"{'title': 'B01'}\n", ["line 1", "asin"]),
    ],
)
def test_unreadable_files_are_named_and_leave_nothing(
    tmp_path: Path, listing: Callable[[Path], list[str]], name: str, content: bytes, words: list[str]
) -> None:
    directory = tmp_path / "beauty"
    if name.startswith("meta"):
        write_gzip(directory / "reviews_Beauty_5.json.gz", REVIEWS)
    elif name.endswith("attributes.json"):
        write_text(directory, SEQUENCES)
    directory.mkdir(exist_ok=True)
    (directory / name).write_bytes(content)
    with pytest.raises(ValueError) as caught:
        prepare_path(directory)
    for word in (name, *words):
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert listing(tmp_path) == ["beauty"]


def test_what_was_converted_is_gone_at_the_end(tmp_path: Path, listing: Callable[[Path], list[str]]) -> None:
    dataset = prepare_path(write_text(tmp_path / "text", SEQUENCES))
    assert listing(dataset.path) == ["context", "dataset.json", "histories", "items.parquet"]


def test_what_lies_at_the_path_decides(tmp_path: Path) -> None:
    data = write_text(tmp_path / "data", SEQUENCES, "Sports_and_Outdoors")
    (data / "README.txt").write_text("1 2 3\n")
    (data / "Sports_and_Outdoors_sample.txt").write_text("1 2 3\n")
    assert amazon_dataset(data).config.name == "amazon_sports_and_outdoors"
    write_text(data, SEQUENCES)
    with pytest.raises(ValueError, match=r"more than one log: Beauty.txt, Sports_and_Outdoors.txt; give the file itself"):
        amazon_dataset(data)
    assert amazon_dataset(data / "Beauty.txt").config.name == "amazon_beauty"
    write_sequences(data, SEQUENCES)
    assert amazon_dataset(data / "sequences.parquet").config.name == "amazon_data"


def test_a_path_without_a_category_is_refused_by_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--path: .*nowhere does not exist"):
        amazon_dataset(tmp_path / "nowhere")
    (tmp_path / "ratings.csv").touch()
    with pytest.raises(ValueError, match=r"none of sequences.parquet, <Category>.txt, reviews_<Category>_5.json.gz, but ratings.csv"):
        amazon_dataset(tmp_path)


def test_settings_of_the_reader_can_be_replaced(tmp_path: Path) -> None:
    directory = write_text(tmp_path / "text", SEQUENCES)
    split = dataclasses.replace(amazon_dataset(directory).config.split, num_targets=2)
    dataset = prepare_path(directory, split=split, max_events_per_shard=4, name="mine")
    assert (dataset.manifest.name, dataset.manifest.split.num_targets, len(dataset.manifest.shards)) == ("mine", 2, 3)


@pytest.mark.parametrize(
    ("category", "counts", "texts"),
    [
        ("beauty", (22_363, 12_101, 198_502), ("title", "attributes")),
        ("sports", (35_598, 18_357, 296_337), ("short_text", "attributes")),
    ],
)
def test_counts_are_the_published_ones(tmp_path: Path, category: str, counts: tuple[int, ...], texts: tuple[str, ...]) -> None:
    directory = Path(os.environ.get(DATA_VARIABLE, "")) / category
    if DATA_VARIABLE not in os.environ or not directory.is_dir():
        pytest.skip(f"needs the data, whose terms are not stated: set {DATA_VARIABLE} to the directory that holds {category}/")
    found = amazon_dataset(directory)
    manifest = prepare(found.config, tmp_path / "out", found.convert).manifest
    assert (manifest.num_users, manifest.num_items, manifest.num_events) == counts
    assert manifest.num_validation_users == manifest.num_test_users == counts[0]
    assert (manifest.name, manifest.text_columns) == (f"amazon_{category}", texts)
    sequences = pl.read_parquet(directory / "sequences.parquet")
    text = write_text(tmp_path / "text", dict(sequences.rows()))
    without_items = prepare(dataclasses.replace(found.config, items=None, text_columns=()), tmp_path / "bare")
    assert prepare_path(text).manifest.content_hash == without_items.manifest.content_hash
