"""Recommendations come from the checkpoint that was tested."""

import json
from pathlib import Path

from gbla_rec.checkpoint.run_directory import RESULTS, Progress, checkpoint_path, write_progress
from gbla_rec.data.histories import StreamPosition
from gbla_rec.evaluation.recommend import _chosen_checkpoint


def test_the_evaluated_checkpoint_goes_before_the_lowest_nll(tmp_path: Path) -> None:
    for step, nll in ((100, 1.0), (200, 2.0)):
        checkpoint_path(tmp_path, step).mkdir(parents=True)
        progress = Progress(step=step, position=StreamPosition(), sequence_hash="", world_size=1, validation_nll=nll)
        write_progress(checkpoint_path(tmp_path, step), progress)
    assert _chosen_checkpoint(tmp_path).progress.step == 100
    (tmp_path / RESULTS).write_text(json.dumps({"checkpoint": "step_00000200"}))
    assert _chosen_checkpoint(tmp_path).progress.step == 200
    # evaluated once, pruned by a longer training since
    (tmp_path / RESULTS).write_text(json.dumps({"checkpoint": "step_00000050"}))
    assert _chosen_checkpoint(tmp_path).progress.step == 100
