"""The figures of the report, on tables small enough to count by hand."""

import json
from pathlib import Path

import polars as pl
import pytest
import torch

from gbla_rec.semantic_ids.report import quality_report, write_report
from gbla_rec.semantic_ids.table import SemanticIdTable

# prefix 0 0 has three items of which two share an ID, prefix 0 1 one, prefix 2 0 two
CODES = torch.tensor([[0, 0, 0], [0, 0, 1], [0, 1, 0], [2, 0, 0], [2, 0, 1], [0, 0, 0]])
TABLE = SemanticIdTable(CODES, (4, 2, 2), pl.Series([10, 11, 12, 13, 14, 15]))


def test_collisions_are_counted_before_and_after_deduplication() -> None:
    report = quality_report(TABLE, source="text")
    assert report["before_dedup"] == {
        "num_distinct": 3, "num_shared": 2, "items_sharing": 5, "fraction_sharing": pytest.approx(5 / 6), "largest": 3,
    }  # fmt: skip
    assert report["after_dedup"] == {
        "num_distinct": 5, "num_shared": 1, "items_sharing": 2, "fraction_sharing": pytest.approx(1 / 3), "largest": 2,
    }  # fmt: skip
    assert [(prefix["prefix"], prefix["num_items"], prefix["item_ids"]) for prefix in report["largest_prefixes"]] == [
        ([0, 0], 3, [10, 11, 15]), ([2, 0], 2, [13, 14]),
    ]  # fmt: skip


def test_usage_and_entropy_are_those_of_the_codes() -> None:
    levels = quality_report(TABLE, source="text", residual_energy=[0.5, 0.25])["levels"]
    assert [level["codes_used"] for level in levels] == [2, 2, 2]
    assert [level["usage"] for level in levels] == [0.5, 1.0, 1.0]
    assert [level["residual_energy"] for level in levels] == [0.5, 0.25, None]
    # 4 of 6 and 2 of 6: log2(6) - (4 * 2 + 2 * 1) / 6 bits
    bits = 2.584962500721156 - 10 / 6
    assert levels[0]["entropy_bits"] == pytest.approx(bits)
    assert levels[0]["entropy_fraction"] == pytest.approx(bits / 2)


def test_even_use_has_full_entropy_and_a_single_code_none() -> None:
    codes = torch.tensor([[code, 1, 0] for code in range(8)])
    levels = quality_report(SemanticIdTable(codes, (8, 4, 1)), source="text")["levels"]
    assert [(level["entropy_bits"], level["entropy_fraction"]) for level in levels] == [(3.0, 1.0), (0.0, 0.0), (0.0, 1.0)]


def test_the_written_report_says_what_is_wrong(tmp_path: Path) -> None:
    titles = pl.Series(["Red | polish", None, "c", "d", "e", "f"])
    report = quality_report(TABLE, source="text", titles=titles, num_without_embedding=1)
    write_report(report, tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["after_dedup"]["num_shared"] == 1
    text = (tmp_path / "report.md").read_text()
    row = "| items that share their ID | 5 (83.3%) | 2 (33.3%) |"
    for part in ("2 items share an ID", "1 items have no embedding", row, "Red | polish"):
        assert part in text
    clean = quality_report(SemanticIdTable(torch.tensor([[0, 0], [1, 0]]), (2, 2)), source="text", num_without_embedding=0)
    write_report(clean, tmp_path)
    assert "**" not in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("blank", [None, "", "  "])
def test_an_item_with_a_blank_title_is_shown_by_its_id(tmp_path: Path, blank: str | None) -> None:
    report = quality_report(TABLE, source="text", titles=pl.Series(["red polish", blank, "c", blank, blank, "f"], dtype=pl.String))
    assert [prefix["titles"] for prefix in report["largest_prefixes"]] == [["red polish", "11", "f"], ["13", "14"]]
    write_report(report, tmp_path)
    assert "- (2, 0): 2 items, e.g. 13; 14" in (tmp_path / "report.md").read_text()
