"""``gbla-rec recommend`` and ``evaluate``: titles are printed as they are; a wrong option is named before a model is loaded."""

import pytest

from gbla_apps import evaluate, recommend
from gbla_rec.evaluation.recommend import Recommendation


def test_brackets_in_titles_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    titles = ["[new] shoes", "a [/b] of one's own"]
    recommend.show(
        Recommendation(history_titles=titles, item_ids=["[x]1", "2"], titles=titles, scores=[-1.0, -2.0], ranked_by="generative")
    )
    printed = capsys.readouterr().out
    assert [printed.count(title) for title in titles] == [2, 2] and "[x]1" in printed


@pytest.mark.usefixtures("workspace")
def test_numbers_below_one_are_refused_by_their_option() -> None:
    with pytest.raises(ValueError, match="--count must be at least 1, got 0"):
        recommend.main(["--user", "1", "--count", "0"])
    with pytest.raises(ValueError, match="--num-beams must be at least 1, got -5"):
        evaluate.main(["--num-beams", "20", "-5"])
