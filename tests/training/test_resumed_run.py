"""Which run ``--resume`` goes on with: the newest of its name, or the one that it was to continue, on all ranks; the log says so."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import (
    Progress,
    checkpoint_path,
    create_run,
    read_dataset_hash,
    read_semantic_ids_hash,
    write_progress,
)
from gbla_rec.config import RunConfig, TrainingConfig
from gbla_rec.data.histories import StreamPosition
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity
from gbla_rec.training.resumed_run import open_run

CPU = torch.device("cpu")
DATA = "hash of the data"
IDS = SemanticIdsIdentity(Path("ids"), "hash of the codes")


def resume_again_and_again(rank: int, world_size: int, config: RunConfig, own_workspace: Path) -> dict[str, Any]:
    """Resume with no run, past a newer run that saved nothing, and with a damaged checkpoint; rank 1 sees no run of rank 0."""
    import torch.distributed as dist

    from gbla_rec.training.trainer import train

    if rank == 1:
        os.environ[workspace.VARIABLE] = str(own_workspace)
    first = train(config, device=CPU, resume=True)
    last = first / "checkpoints/step_00000002"
    dist.barrier()
    if rank == 0:
        shutil.rmtree(last)
        create_run(workspace.new_run_dir(config.name), config, read_dataset_hash(first), read_semantic_ids_hash(first))
    again = train(config, device=CPU, resume=True)
    dist.barrier()
    if rank == 0:
        (last / "progress.json").unlink()
        shutil.rmtree(workspace.run_dirs(config.name)[0])
    with pytest.raises(ValueError) as damaged:
        train(config, device=CPU, resume=True)
    return {"first": first, "again": again, "damaged": str(damaged.value)}


@pytest.mark.timeout(60)
def test_all_ranks_resume_the_run_that_the_newest_continues(run_ranks: Any, tiny_run: Any, tiny_workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_workspace, tmp_path / "own")
    config = tiny_run(training=TrainingConfig(num_steps=2, save_every=1, log_every=1, validation_users=5))
    first, second = run_ranks(resume_again_and_again, 2, config, tmp_path / "own")
    (only,) = (tiny_workspace / "runs" / config.name).iterdir()
    assert first == second and first["first"] == first["again"] == only and not (tmp_path / "own" / "runs").exists()
    assert f"{only}/checkpoints/step_00000002 is damaged: it has no progress.json" in first["damaged"]
    log = (tmp_path / "ranks-0" / "0.output").read_text()
    assert log.count(f"nothing to resume: no unfinished run called {config.name!r} has a checkpoint; a new run starts") == 1
    assert log.count(f"resumed from {only}/checkpoints/step_00000001") == 1


class Runs:
    """Runs of one name in a workspace, made without training."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def add(self, *steps: int, data: str = DATA, ids: str = IDS.content, **changes: Any) -> Path:
        """A run with checkpoints of these steps."""
        run_dir = workspace.new_run_dir(self.config.name)
        create_run(run_dir, dataclasses.replace(self.config, **changes), data, ids)
        for step in steps:
            checkpoint_path(run_dir, step).mkdir()
            progress = Progress(step=step, position=StreamPosition(), sequence_hash="", world_size=1)
            write_progress(checkpoint_path(run_dir, step), progress)
        return run_dir

    def resumed(self, *, step: int | None = None, **changes: Any) -> Path:
        """What a resumed run with these changes goes on in."""
        return open_run(dataclasses.replace(self.config, **changes), step is None, step, DATA, IDS)[0]


@pytest.fixture
def runs(tiny_run: Any, workspace: Path) -> Runs:
    return Runs(tiny_run())


def test_the_newest_run_goes_on_finished_or_not(runs: Runs) -> None:
    runs.add(2)
    for steps in ((2,), (2, runs.config.training.num_steps)):
        newest = runs.add(*steps)
        assert runs.resumed() == newest


def test_a_run_that_died_early_gives_way_to_an_unfinished_one_like_it_alone(runs: Runs) -> None:
    wanted = runs.add(2)
    finished = runs.add(2, runs.config.training.num_steps)
    others = [runs.add(2, data="other"), runs.add(2, ids="other"), runs.add(2, seed=1)]
    (runs.add() / "checkpoints" / "step_00000002.bak").mkdir()
    assert runs.resumed() == wanted and runs.resumed(step=2) == finished
    shutil.rmtree(wanted)
    newest = runs.resumed()
    assert newest not in (finished, *others) and not list(newest.glob("checkpoints/*"))


def test_each_seed_of_a_name_goes_on_in_its_own_run_and_other_options_are_refused(runs: Runs) -> None:
    first, second = runs.add(2), runs.add(2, seed=1)
    assert runs.resumed() == first and runs.resumed(seed=1) == second
    with pytest.raises(ValueError, match=f"cannot resume {second}: its config.json differs in seed, and no older run .* has these options"):
        runs.resumed(seed=2)
    with pytest.raises(ValueError, match="or leave --resume-step out"):
        runs.resumed(seed=2, step=2)


def test_no_run_to_go_back_in_is_named(runs: Runs) -> None:
    runs.add()
    with pytest.raises(FileNotFoundError, match=f"--resume-step needs a run called {runs.config.name!r} with a checkpoint"):
        runs.resumed(step=2)
