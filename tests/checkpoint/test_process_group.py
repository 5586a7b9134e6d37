"""The process group of a run: what is called outside of one says what it lacks."""

from pathlib import Path

import pytest
import torch

from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.recipes import recipe


def test_a_run_opened_outside_a_process_group_is_told_how_to_join_one(workspace: Path) -> None:
    with pytest.raises(RuntimeError, match=r"RunParts.open needs a process group: call it within `with .*process_group\(\) as device:`"):
        RunParts.open(recipe("movielens_small"), torch.device("cpu"))
