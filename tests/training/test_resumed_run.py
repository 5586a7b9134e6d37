"""Which run ``--resume`` goes on with: the newest of its name that has a checkpoint, the same one on all ranks, and the log says so."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import create_run
from gbla_rec.config import RunConfig, TrainingConfig

CPU = torch.device("cpu")


def resume_again_and_again(rank: int, world_size: int, config: RunConfig, own_workspace: Path) -> dict[str, Any]:
    """Resume with no run, with a newer run that saved nothing, and with checkpoints damaged and gone; rank 1 sees no run of rank 0."""
    import torch.distributed as dist

    from gbla_rec.training.trainer import train

    if rank == 1:
        os.environ[workspace.VARIABLE] = str(own_workspace)
    found: dict[str, Any] = {"first": train(config, device=CPU, resume=True)}
    if rank == 0:
        create_run(workspace.new_run_dir(config.name), config, "hash")
    found["again"] = train(config, device=CPU, resume=True)
    found["from step 1"] = train(config, device=CPU, resume_step=1)
    dist.barrier()
    if rank == 0:
        (found["first"] / "checkpoints/step_00000001/progress.json").unlink()
    with pytest.raises(ValueError) as damaged:
        train(config, device=CPU, resume=True)
    dist.barrier()
    if rank == 0:
        shutil.rmtree(found["first"] / "checkpoints/step_00000001")
    with pytest.raises(FileNotFoundError) as gone:
        train(config, device=CPU, resume_step=1)
    found["new"] = train(config, device=CPU, resume=True)
    return found | {"damaged": str(damaged.value), "gone": str(gone.value)}


@pytest.mark.timeout(60)
def test_all_ranks_resume_the_newest_run_with_a_checkpoint(run_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_workspace, tmp_path / "own")
    config = tiny_run(training=TrainingConfig(num_steps=1, log_every=1, validation_users=5))
    first, second = run_ranks(resume_again_and_again, 2, config, tmp_path / "own")
    assert first == second
    oldest, empty, newest = sorted((tiny_workspace / "runs" / config.name).iterdir())
    assert first["first"] == first["again"] == first["from step 1"] == oldest and first["new"] == newest
    assert f"{oldest}/checkpoints/step_00000001 is damaged: it has no progress.json" in first["damaged"]
    assert f"no run called {config.name!r} with a checkpoint" in first["gone"]
    assert not (tmp_path / "own" / "runs").exists() and not list(empty.glob("checkpoints/*"))
    log = (tmp_path / "ranks-0" / "0.output").read_text()
    assert log.count(f"nothing to resume: no run called {config.name!r} has a checkpoint; a new run starts") == 2
    assert log.count(f"resuming {oldest.name}: {empty} is newer, but has no checkpoint") == 2
