"""docs/api.md: every public name can be imported from where the page says."""

import importlib
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "api.md"
ROW = re.compile(r"^\| (?P<names>`[^|]*`[^|]*) \| `(?P<module>gbla_\w+(?:\.\w+)*)` \|", re.MULTILINE)
ROWS = [(match["module"], re.findall(r"`(\w+)`", match["names"])) for match in ROW.finditer(PAGE.read_text())]


@pytest.mark.parametrize(("module", "names"), ROWS, ids=[module for module, _ in ROWS])
def test_names_come_from_the_module_of_their_row(module: str, names: list[str]) -> None:
    found = importlib.import_module(module)
    assert names
    for name in names:
        assert hasattr(found, name), name


def test_the_page_has_rows() -> None:
    assert {"gbla_kernels", "gbla_rec.config", "gbla_rec.semantic_ids.tokenize"} <= {module for module, _ in ROWS}
