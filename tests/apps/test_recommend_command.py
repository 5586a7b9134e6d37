"""``gbla-rec recommend``: titles are printed as they are, and a wrong option is named before a model is loaded."""

import pytest

from gbla_apps.recommend import main, show
from gbla_rec.evaluation.recommend import Recommendation


def test_brackets_in_titles_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["[new] shoes", "a [/b] of one's own"]
    show(Recommendation(history_titles=titles, item_ids=["[x]1", "2"], titles=titles, scores=[-1.0, -2.0], ranked_by="generative"))
    printed = capsys.readouterr().out
    assert [printed.count(title) for title in titles] == [2, 2] and "[x]1" in printed


def test_a_count_below_one_is_refused_by_its_option(workspace: object) -> None:
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        main(["--user", "1", "--count", "0"])
