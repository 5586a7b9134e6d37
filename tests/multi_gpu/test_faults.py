"""A rank that is killed under NCCL, and SIGTERM to torchrun: the run ends with the result of an undisturbed one."""

from typing import Any

import pytest

pytestmark = [pytest.mark.multi_gpu, pytest.mark.timeout(480)]
TOLERANCE = 2e-5
"""Relative, against one rank in fp32, as in ``test_curves``."""


def test_a_killed_rank_is_restarted_and_the_result_is_that_of_an_undisturbed_run(launcher: Any, first_launches: Any, alone: Any) -> None:
    killed = first_launches["killed"].results()["killed"]
    assert killed["attempt"] == 1
    assert len(list(launcher.workspace.glob("runs/killed/*"))) == 1, "the restarted ranks go on with the same run"
    for key in ("steps", "losses", "nll"):
        assert killed[key] == pytest.approx(alone["fp32"][key], rel=TOLERANCE), key
    assert killed["table_change"] == pytest.approx(alone["fp32"]["table_change"], rel=20 * TOLERANCE)


def test_sigterm_to_torchrun_saves_and_resume_reaches_the_result(first_launches: Any, on_two: Any, alone: Any) -> None:
    assert first_launches["terminated"].wait() != 0
    output = " ".join(first_launches["terminated"].output.split())
    _, found, after = output.partition("SIGTERM: saved step ")
    assert found, output[-4000:]
    assert 6 <= int(after.split()[0]) < 16
    resumed = on_two["terminated"]
    for key in ("steps", "losses", "nll"):
        assert resumed[key] == pytest.approx(alone["fp32"][key], rel=TOLERANCE), key
