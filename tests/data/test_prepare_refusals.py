"""Bad input gives one error that names the file, the column and the row (of a CSV: the line), and leaves nothing behind."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gbla_rec.config import PrepareConfig, SplitConfig
from gbla_rec.data import csv_widths
from gbla_rec.data.prepare import prepare

GOOD = pl.DataFrame({"user_id": [1, 1, 2], "item_id": [5, 6, 5], "timestamp": [1, 2, 3], "action": ["a", "b", "a"]})
GROUPED = pl.DataFrame({"user_id": ["a", "b"], "items": [[3, 1], [5]], "timestamp": [[1, 2], [5]], "action": [["x", None], ["x"]]})


def with_values(**columns: list[Any] | pl.Series) -> pl.DataFrame:
    return GOOD.with_columns(**{name: values if isinstance(values, pl.Series) else pl.Series(values) for name, values in columns.items()})


def refuse(directory: Path, error: type[Exception], *words: str, name: str = "log.parquet", **settings: Any) -> None:
    before = sorted(directory.iterdir())
    with pytest.raises(error) as caught:
        prepare(PrepareConfig(name="test", events=directory / name, **settings), directory / "out")
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
    assert sorted(directory.iterdir()) == before


def in_csv(word: str) -> str:
    """A row of a Parquet file, in a CSV file whose rows are one line each below the header."""
    return re.sub(r"row (\d+)", lambda found: f"line {int(found[1]) + 2}", word)


@pytest.mark.parametrize("form", ["parquet", "csv"])
@pytest.mark.parametrize(
    ("frame", "words"),
    [
        pytest.param(
            GOOD.drop("item_id"),
            ["item column 'item_id' is missing", "user_id", "name another one with --item-column"],
            id="missing column",
        ),
        pytest.param(with_values(user_id=[1, None, None]), ["'user_id', row 1", "missing", "2 such"], id="null user"),
        pytest.param(with_values(item_id=["x", "y", None]), ["'item_id', row 2", "missing"], id="null item"),
        pytest.param(with_values(timestamp=[None, 1, 2]), ["'timestamp', row 0", "missing"], id="null time"),
        pytest.param(
            with_values(timestamp=["2020-01-01", "2020-13-01", "2020-01-02"]), ["'timestamp', row 1", "2020-13-01"], id="bad date"
        ),
        pytest.param(with_values(timestamp=["1", "2", "2020-01-01"]), ["'timestamp', row 2", "2020-01-01"], id="mixed times"),
        pytest.param(with_values(timestamp=[1.0, 2.5, 3.0]), ["'timestamp'", "ISO-8601"], id="fractional times"),
        pytest.param(GOOD.clear(), ["no events"], id="no rows"),
    ],
)
def test_bad_logs_are_refused(tmp_path: Path, form: str, frame: pl.DataFrame, words: list[str]) -> None:
    name = f"log.{form}"
    frame.write_csv(tmp_path / name) if form == "csv" else frame.write_parquet(tmp_path / name)
    refuse(tmp_path, ValueError, name, *(map(in_csv, words) if form == "csv" else words), name=name)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        pytest.param(with_values(item_id=[1.0, 2.0, 3.0]), ["'item_id' is Float64", "integers or strings"], id="float ids"),
        pytest.param(with_values(item_id=pl.Series([1, 2**63, 3], dtype=pl.UInt64)), ["'item_id', row 1", "does not fit"], id="uint64 ids"),
        pytest.param(
            with_values(action=pl.Series([1, 2, 2**63], dtype=pl.UInt64)), ["'action', row 2", "does not fit"], id="uint64 context"
        ),
        pytest.param(with_values(action=[[1], [2], [3]]), ["'action' is List", "single values"], id="list context"),
        pytest.param(GOOD.drop("action"), ["context column 'action' is missing", "--context-columns"], id="unknown context column"),
    ],
)
def test_bad_parquet_columns_are_refused(tmp_path: Path, frame: pl.DataFrame, words: list[str]) -> None:
    frame.write_parquet(tmp_path / "log.parquet")
    refuse(tmp_path, ValueError, "log.parquet", *words, context_columns=("action",))


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        pytest.param(pl.concat([GROUPED, GROUPED]), ["user 'a' has more than one sequence", "row 0", "row 2"], id="user twice"),
        pytest.param(GROUPED.with_columns(timestamp=pl.Series([[1], [5]])), ["'timestamp', row 0", "as long as 'items'"], id="short times"),
        pytest.param(GROUPED.with_columns(action=pl.Series([["x", "y"], None])), ["'action', row 1", "null"], id="null context list"),
        pytest.param(GROUPED.with_columns(items=pl.Series([None, [5]])), ["'items', row 0", "null"], id="null sequence"),
        pytest.param(GROUPED.with_columns(items=pl.Series([[1, None], [5]])), ["'items', row 0", "missing"], id="null inside a sequence"),
        pytest.param(GROUPED.with_columns(items=pl.Series([1, 2])), ["'items' is Int64", "must be a list"], id="no sequence"),
        pytest.param(GROUPED.drop("items"), ["sequence column 'items' is missing", "--sequence-column"], id="missing sequence"),
    ],
)
def test_bad_sequences_are_refused(tmp_path: Path, frame: pl.DataFrame, words: list[str]) -> None:
    frame.write_parquet(tmp_path / "log.parquet")
    refuse(tmp_path, ValueError, *words, sequence_column="items", context_columns=("action",))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("log.parquet", b"", ["empty"]),
        ("log.csv", b"", ["empty"]),
        ("log.parquet", b"PAR1 not a file", ["not a whole Parquet file"]),
        (
            "log.csv",
            b"user_id,item_id,timestamp\n1,2,3\n1,2,3,4\n",
            ["line 3 has 4 fields, the header has 3; quote fields that hold a comma, or mend the line"],
        ),
        ("log.csv", b"user_id,item_id,timestamp\n1,2,3\n1,2\n", ["line 3 has 2 fields, the header has 3"]),
        (
            "log.csv",
            b'user_id,item_id,timestamp,note\n1,2,3,"a\nb"\n1,2,4,"c\nd',
            ["line 4 begins a quoted field that does not end; mend it; a file cut off"],
        ),
        (
            "log.csv",
            b"user_id,item_id,timestamp\n" + b"1,2,3\n" * 5000 + b"1,\xff,3\n",
            ["line 5002 is not UTF-8 text", "save the file as UTF-8"],
        ),
        ("log.csv", b"user_id;item_id;timestamp\n1;2;3\n", ["'user_id' is missing", "must be separated by commas"]),
        ("log.json", b"{}", [".parquet"]),
    ],
)
def test_unreadable_files_are_refused(tmp_path: Path, name: str, content: bytes, words: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path, ValueError, name, *words, name=name)


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("2,,3", ": the value is missing"),
        ("2,5,soon", ": 'soon' is not a timestamp"),
        ("2,5,3,4,5", " has 5 fields"),
        ("2,5", " has 2 fields"),
    ],
)
@pytest.mark.parametrize(
    "above",
    [
        pytest.param(["user_id,item_id,timestamp"], id="header"),
        pytest.param(["", "", "user_id,item_id,timestamp", "1,5,3"], id="blank lines above the header"),
        pytest.param(["user_id,item_id,timestamp", '1,"a', "", '""b""",3', '1,"c', 'd",3'], id="quoted fields over several lines"),
    ],
)
def test_a_bad_csv_value_is_named_by_the_line_that_an_editor_shows(
    tmp_path: Path, above: list[str], bad: str, what: str, line_end: str
) -> None:
    (tmp_path / "log.csv").write_bytes(line_end.join([*above, bad, "3,6,4", ""]).encode())
    refuse(tmp_path, ValueError, f"line {len(above) + 1}{what}", name="log.csv")


def test_a_csv_header_may_span_lines(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text('user_id,item_id,timestamp,"two\nlines"\n1,5,3,"x\n\ny"\n2,5,soon,\n')
    refuse(tmp_path, ValueError, "line 6: 'soon' is not a timestamp", name="log.csv")


def test_a_log_cut_off_in_its_last_line_is_refused(tmp_path: Path) -> None:
    rows = "".join(f"{user},5,{100 + user},click\n" for user in range(55))
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,action\n{rows}55,5,1")
    words = ["log.csv: line 57 has 3 fields, the header has 4; ", "mend the line; a file cut off while it was written ends so"]
    refuse(tmp_path, ValueError, *words, name="log.csv")


@pytest.mark.parametrize(("row", "fields"), [("1,5,3", "3 fields"), ("1,5,3,x,y", "5 fields"), ("1", "1 field"), ("1,5,3,,", "5 fields")])
@pytest.mark.parametrize("above", ["", '1,5,2,"a, ""b""\nc"\n', "1,5,2,\n" * 100_000], ids=["header", "quotes", "many blocks"])
def test_a_row_of_another_width_is_refused_in_columns_that_the_log_does_not_read(tmp_path: Path, above: str, row: str, fields: str) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,note\n{above}{row}\n2,5,4,\n")
    line = 2 + above.count("\n")
    refuse(tmp_path, ValueError, f"line {line} has {fields}, the header has 4", name="log.csv")


@pytest.mark.parametrize("next_row", ["1,5,3,x,y", "2"], ids=["as many line ends as rows", "a line end where one is due"])
def test_rows_that_make_up_for_each_other_are_refused(tmp_path: Path, next_row: str) -> None:
    (tmp_path / "log.csv").write_text(f"user_id,item_id,timestamp,note\n1,5,3\n{next_row}\n2,6,4,x\n")
    refuse(tmp_path, ValueError, "line 2 has 3 fields", name="log.csv")


@pytest.mark.parametrize("row", ["7", "7,c,d", "7,c,d,e"])
def test_an_item_table_with_a_row_of_another_width_is_refused(tmp_path: Path, row: str) -> None:
    GOOD.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "items.csv").write_text(f"item_id,title\n5,a\n6,b\n{row}")
    words = f"items.csv: line 4 has {row.count(',') + 1} field"
    refuse(tmp_path, ValueError, words, ", the header has 2", items=tmp_path / "items.csv", text_columns=("title",))


WHOLE = ['"user,id",item_id,timestamp,note', '1,5,3,"a, ""b"""', f'1,6,4,"{"x, " * 200_000}', '"', "2,5,5,", '2,6,6,""']


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_good_csv_of_any_writing_needs_no_slow_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_end: str, end: str) -> None:
    def slow(*_: Any, **__: Any) -> None:
        raise AssertionError("a good file was counted row by row")

    monkeypatch.setattr(csv_widths, "first_unequal_row", slow)
    (tmp_path / "log.csv").write_text("\ufeff" + line_end.join(WHOLE) + end.replace("\n", line_end), newline="")
    config = PrepareConfig(name="test", events=tmp_path / "log.csv", user_column="user,id", context_columns=("note",))
    assert prepare(config, tmp_path / "out").manifest.num_events == 4


@pytest.mark.parametrize("note", ["", '5" or 6" a', "a\rb", "x" * 200_000], ids=["empty", "stray quotes", "carriage return", "long"])
@pytest.mark.parametrize("above", ["", "\n\n"], ids=["", "blank lines"])
def test_only_the_row_of_another_width_is_blamed(tmp_path: Path, above: str, note: str) -> None:
    rows = f"{above}user_id,item_id,timestamp,note\n1,5,3,{note}\n2,6,4,x\n"
    (tmp_path / "log.csv").write_text(rows, newline="")
    assert prepare(PrepareConfig(name="test", events=tmp_path / "log.csv"), tmp_path / "good").manifest.num_events == 2
    (tmp_path / "log.csv").write_text(f"{rows}2,5,6", newline="")
    refuse(tmp_path, ValueError, f"line {4 + len(above)} has 3 fields, the header has 4", name="log.csv")


def test_a_blank_line_below_the_csv_header_is_named(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n1,5,3\n\n2,6,4\n")
    refuse(tmp_path, ValueError, "column 'user_id', line 3: the value is missing", name="log.csv")


def test_items_of_a_csv_table_are_named_by_line(tmp_path: Path) -> None:
    GOOD.write_parquet(tmp_path / "log.parquet")
    (tmp_path / "items.csv").write_text('item_id,title\n5,"two\nlines"\n6,b\n5,c\n')
    refuse(tmp_path, ValueError, "items.csv line 2 and ", "items.csv line 5; 1 ids", items=tmp_path / "items.csv", text_columns=("title",))
    (tmp_path / "items.csv").write_text('item_id,title\n5,"two\nlines"\n,b\n')
    refuse(tmp_path, ValueError, "items.csv: column 'item_id', line 4:", items=tmp_path / "items.csv", text_columns=("title",))


@pytest.mark.parametrize("damage", ["cut", "zeros"])
def test_the_damaged_file_among_several_is_named(tmp_path: Path, damage: str) -> None:
    (tmp_path / "log").mkdir()
    for number in range(3):
        GOOD.write_parquet(tmp_path / "log" / f"{number}.parquet")
    content = (tmp_path / "log" / "1.parquet").read_bytes()
    broken = content[: len(content) // 2] if damage == "cut" else content[:4] + bytes(120) + content[124:]
    (tmp_path / "log" / "1.parquet").write_bytes(broken)
    refuse(tmp_path, ValueError, "1.parquet", "truncated", name="log")


def test_files_that_disagree_are_refused(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    GOOD.write_parquet(tmp_path / "log" / "0.parquet")
    with_values(timestamp=["2020-01-01"] * 3).write_parquet(tmp_path / "log" / "1.parquet")
    refuse(tmp_path, ValueError, "0.parquet", "1.parquet", "'timestamp'", name="log")


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (pl.DataFrame({"item_id": [5, 6, 5], "title": ["a", "b", "c"]}), ["item_id 5 occurs more than once", "row 0", "row 2"]),
        (pl.DataFrame({"item_id": [5, None], "title": ["a", "b"]}), ["items.parquet", "'item_id', row 1"]),
        (pl.DataFrame({"item_id": [5.0], "title": ["a"]}), ["items.parquet", "'item_id' is Float64"]),
        (pl.DataFrame({"id": [5], "title": ["a"]}), ["items.parquet", "item column 'item_id' is missing", "--item-column"]),
        (pl.DataFrame({"item_id": [5]}), ["items.parquet", "text column 'title' is missing", "--text-columns"]),
        (
            pl.DataFrame({"item_id": ["05", "06"], "title": ["a", "b"]}),
            [
                "items.parquet: column 'item_id' must hold ids of items of the log",
                "none of the log's 2, e.g. '5': its own are such as '05'",
            ],
        ),
        (pl.DataFrame({"item_id": [7], "title": ["a"]}), ["e.g. 5: its own are such as 7", "or prepare without an item table"]),
        (pl.DataFrame(schema={"item_id": pl.Int64, "title": pl.String}), ["none of the log's 2, e.g. 5: it has no row"]),
    ],
)
def test_bad_item_tables_are_refused(tmp_path: Path, items: pl.DataFrame, words: list[str]) -> None:
    GOOD.write_parquet(tmp_path / "log.parquet")
    items.write_parquet(tmp_path / "items.parquet")
    refuse(tmp_path, ValueError, *words, items=tmp_path / "items.parquet", text_columns=("title",))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context_columns": ("action", "action")}, ["twice"]),
        ({"context_columns": ("items",)}, ["'items' cannot be stored"]),
        ({"text_columns": ("title",)}, ["--text-columns title needs an item table", "--items"]),
        ({"split": SplitConfig(kind="temporal", temporal_fraction=0.001)}, ["share that timestamp"]),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings: dict[str, Any], words: list[str]) -> None:
    GOOD.write_parquet(tmp_path / "log.parquet")
    refuse(tmp_path, ValueError, *words, **settings)


def test_a_temporal_split_needs_times(tmp_path: Path) -> None:
    GROUPED.drop("timestamp").write_parquet(tmp_path / "log.parquet")
    refuse(tmp_path, ValueError, "needs timestamps", sequence_column="items", split=SplitConfig(kind="temporal"))


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    refuse(tmp_path, FileNotFoundError, "--events must be a file or a directory", "nowhere", name="nowhere")
    (tmp_path / "log").mkdir()
    refuse(tmp_path, ValueError, "--events: the directory", "holds no file", name="log")
    refuse(tmp_path, FileNotFoundError, "--items must be a file or a directory", "nowhere", items=tmp_path / "nowhere")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: path.symlink_to("nowhere")])
def test_an_existing_output_is_refused_and_untouched(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    GOOD.write_parquet(tmp_path / "log.parquet")
    make(tmp_path / "out")
    refuse(tmp_path, FileExistsError, "out", "exists")


@pytest.mark.parametrize("before", ["", "\ufeff", "\n"])
def test_a_column_that_the_header_has_twice_is_refused_if_it_is_read(tmp_path: Path, before: str) -> None:
    (tmp_path / "log.csv").write_text(f"{before}user_id,item_id,timestamp,timestamp\n1,2,3,4\n")
    refuse(tmp_path, ValueError, "log.csv: time column 'timestamp' is twice in the header", name="log.csv")
    (tmp_path / "other.csv").write_text(f"{before}user_id,item_id,timestamp,timestamp_duplicated_0,a,a\n1,2,3,4,5,6\n")
    config = PrepareConfig(name="x", events=tmp_path / "other.csv", context_columns=("timestamp_duplicated_0",))
    assert prepare(config, tmp_path / "out").manifest.num_events == 1
