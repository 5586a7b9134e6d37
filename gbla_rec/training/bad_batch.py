"""The end of a run at a step that was not finite: its batch on disk, and one error on all ranks."""

import math
from dataclasses import astuple
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from gbla_rec.checkpoint.run_directory import TEMPORARY_PREFIX
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.data.stream import TrainingStream
from gbla_rec.training.step_guard import BadStep

BAD_BATCHES = "bad_batches"


def stop_at(bad: BadStep, run_dir: Path, stream: TrainingStream) -> NoReturn:
    """Save this rank's part of the batch, then stop; all ranks call it together.

    The part is read again at its position in the stream, which always gives the same batch: the loop keeps none.

    Raises:
        FloatingPointError: on all ranks, with one text: the step, what was not finite on which rank, the files, the cure.
    """
    directory = run_dir / BAD_BATCHES / f"step_{bad.step:08d}"
    outcomes: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(outcomes, (_finding(bad), _save_part(bad, directory, stream)))
    findings = "; ".join(f"rank {rank}: {finding}" for rank, (finding, _) in enumerate(outcomes) if finding)
    unsaved = "; ".join(f"rank {rank}: {failure}" for rank, (_, failure) in enumerate(outcomes) if failure)
    saved = f"its batch is in {directory}, a file for each rank" + (f" (not saved: {unsaved})" if unsaved else "")
    raise FloatingPointError(
        f"step {bad.step} is not finite ({findings}); from it on no weight changed (tables keep earlier micro batches of it), "
        f"nothing was saved since; {saved}; "
        "train with --resume to go on from the newest checkpoint; if the step fails again, look at its batch, or start a new run "
        "with a lower --optimizer.learning-rate"
    )


def write_batch(path: Path, histories: HistoryBatch) -> None:
    """Write a batch as ``.npz``, complete or absent: the arrays of ``HistoryBatch``, context columns as ``context/<name>``."""
    position = histories.position
    arrays: dict[str, NDArray[Any]] = {
        "user_rows": histories.user_rows,
        "items": histories.items,
        "offsets": histories.offsets,
        "targets": histories.targets,
        "target_offsets": histories.target_offsets,
        "token_keys": histories.token_keys,
        "position": np.array(astuple(position) if position is not None else (), np.int64),
        **{f"context/{name}": codes for name, codes in histories.context.items()},
    }
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    with temporary.open("wb") as file:
        # its annotations take every name for the option allow_pickle
        np.savez(file, **arrays)  # type: ignore[arg-type]
    temporary.rename(path)


def _finding(bad: BadStep) -> str:
    parts = {
        "loss": bad.loss,
        "norm of the dense gradients": bad.dense_gradient_norm,
        "norm of the table gradients": bad.table_gradient_norm,
    }
    return ", ".join(f"{name} {value}" for name, value in parts.items() if not math.isfinite(value))


def _save_part(bad: BadStep, directory: Path, stream: TrainingStream) -> str:
    """What went wrong, or nothing: the error to report is that of the step."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        write_batch(directory / f"rank_{dist.get_rank():05d}.npz", next(stream.batches(bad.position)))
    except (OSError, ValueError) as error:
        return str(error)
    return ""
