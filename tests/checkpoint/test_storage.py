"""Checkpoints: bit-exact on another number of ranks, never half-written, pruned."""

import dataclasses
import math
import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec.checkpoint.run_directory import (
    Progress,
    best_checkpoints,
    checkpoint_path,
    checkpoints,
    code_version,
    prune_checkpoints,
    write_progress,
)
from gbla_rec.config import RunConfig
from gbla_rec.data.histories import StreamPosition

CPU = torch.device("cpu")


def train_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU))


def read_tables(rank: int, world_size: int, run_dir: str, config: RunConfig) -> dict[str, torch.Tensor]:
    """The whole tables after loading the newest checkpoint, gathered from all ranks."""
    from torch.distributed._shard.sharded_tensor import ShardedTensor

    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.checkpoint.storage import load_checkpoint

    parts = RunParts.open(config, CPU)
    load_checkpoint(checkpoints(Path(run_dir))[-1], parts.model, None)
    tables = {}
    for name, value in parts.model.state_dict().items():
        if isinstance(value, ShardedTensor):
            tables[name] = torch.zeros(value.size())
            value.gather(out=tables[name] if rank == 0 else None)
        else:
            tables[name] = value.detach().clone()
    return tables


def with_sharding(config: RunConfig, sharding: str) -> RunConfig:
    embedding = dataclasses.replace(config.model.embedding, sharding=sharding)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, embedding=embedding))


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(300)
def test_weights_are_bit_exact_on_any_ranks(run_ranks: Any, tiny_run: Any) -> None:
    config = with_sharding(tiny_run(), "row_wise")
    run_dir = run_ranks(train_run, 2, config)[0]
    alone = run_ranks(read_tables, 1, run_dir, config)[0]
    for sharding in ("row_wise", "table_wise"):
        first = run_ranks(read_tables, 2, run_dir, with_sharding(config, sharding))[0]
        assert first.keys() == alone.keys()
        for name, value in alone.items():
            assert torch.equal(first[name], value), (name, sharding)
    assert any("item_hash_0" in name for name in alone)

    progress = checkpoints(Path(run_dir))[-1].progress
    assert progress.file_digests.keys() == progress.file_sizes.keys() and len(progress.file_sizes) >= 3


def train_and_note_flushes(rank: int, world_size: int, config: RunConfig) -> list[str]:
    """Names of what is forced to disk, and of the checkpoints that are deleted, in order."""
    from gbla_rec.checkpoint import run_directory
    from gbla_rec.training import trainer

    notes = []
    flush, remove = os.fsync, shutil.rmtree

    def note_flush(descriptor: int) -> None:
        notes.append(f"flush {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        flush(descriptor)

    def note_removal(path: Path, *arguments: Any, **options: Any) -> None:
        if Path(path).exists():
            notes.append(f"delete {Path(path).name}")
        remove(path, *arguments, **options)

    os.fsync, run_directory.shutil.rmtree = note_flush, note_removal  # type: ignore[assignment]
    trainer.train(config, device=CPU)
    return notes


@pytest.mark.usefixtures("tiny_workspace")
def test_a_checkpoint_is_on_disk_before_an_older_one_is_deleted(run_ranks: Any, tiny_run: Any) -> None:
    training = dataclasses.replace(tiny_run().training, num_steps=3, save_every=1, validate_every=3, keep_last=1, keep_best=1)
    (notes,) = run_ranks(train_and_note_flushes, 1, tiny_run(training=training))
    newest = notes[: next(index for index, note in enumerate(notes) if note.startswith("delete"))]
    last = {name: index for index, name in enumerate(newest)}
    progress = max(index for name, index in last.items() if "progress.json" in name)
    directory = max(index for name, index in last.items() if name.startswith("flush .tmp-") and "progress.json" not in name)
    assert progress < directory < last["flush checkpoints"] and len([name for name in newest if name == "flush checkpoints"]) == 2


def train_while_the_disk_fills(rank: int, world_size: int, config: RunConfig) -> str:
    """Train; from the second save on, rank 1 can write no more than 1,024 bytes into a file."""
    from gbla_rec.training import trainer

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save = trainer.save_checkpoint

    def save_and_fill(*arguments: Any) -> Path:
        path = save(*arguments)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
        return path

    trainer.save_checkpoint = save_and_fill
    with pytest.raises(OSError, match="could not be saved") as refused:
        trainer.train(config, device=CPU)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(refused.value)


def resume_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU, resume=True))


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(300)
def test_a_full_disk_on_one_rank_loses_nothing_that_was_saved(run_ranks: Any, tiny_run: Any) -> None:
    config = with_sharding(tiny_run(), "row_wise")
    for message in run_ranks(train_while_the_disk_fills, 2, config):
        assert "rank 1" in message and re.search(r"; [\d,]+\.\d MiB were free on the disk; make room, then train with --resume", message)
    from gbla_rec import workspace

    run_dir = workspace.latest_run_dir(config.name)
    assert [found.progress.step for found in checkpoints(run_dir)] == [2]
    assert not list(run_dir.glob("checkpoints/.tmp-*"))
    assert run_ranks(resume_run, 2, config)[0] == str(run_dir)
    assert checkpoints(run_dir)[-1].progress.step == config.training.num_steps


def train_until_asked_to_stop(rank: int, world_size: int, config: RunConfig, num_batches: int) -> object:
    """Train as if SIGTERM came before batch ``num_batches``; returns the exit status."""
    from gbla_rec.training import preemption, trainer

    calls = iter(range(num_batches))
    preemption.StopRequest.is_due = lambda self: next(calls, None) is None  # type: ignore[method-assign]
    with pytest.raises(SystemExit) as stopped:
        trainer.train(config, device=CPU)
    return stopped.value.code


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.parametrize(("num_batches", "saved"), [(3, [2, 3]), (4, [2, 3, 4]), (5, [2, 3, 4, 5])])
def test_a_stop_saves_once_and_keeps_what_validation_found(run_ranks: Any, tiny_run: Any, num_batches: int, saved: list[int]) -> None:
    # saved after 2, 3 (with a validation), 4 and 6 steps
    training = dataclasses.replace(tiny_run().training, keep_last=9)
    config = tiny_run(training=training)
    assert run_ranks(train_until_asked_to_stop, 1, config, num_batches) == [143]
    from gbla_rec import workspace

    found = checkpoints(workspace.latest_run_dir(config.name))
    assert [checkpoint.progress.step for checkpoint in found] == saved
    assert found[1].progress.validation_nll is not None


def save_twice(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.checkpoint.storage import load_checkpoint
    from gbla_rec.training import trainer

    run_dir = trainer.train(config, device=CPU)
    parts = trainer.RunParts.open(config, CPU)
    again = trainer.Trainer(parts, run_dir)
    again._save(1.5)
    load_checkpoint(checkpoints(run_dir)[-1], parts.model, None)
    return str(run_dir)


@pytest.mark.usefixtures("tiny_workspace")
def test_a_step_saved_again_replaces_the_first(run_ranks: Any, tiny_run: Any) -> None:
    run_dir = Path(run_ranks(save_twice, 2, tiny_run())[0])
    assert checkpoints(run_dir)[-1].progress.validation_nll == 1.5
    assert not list(run_dir.glob("checkpoints/.tmp-*"))


def make(run_dir: Path, step: int, nll: float | None) -> Path:
    path = checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    write_progress(path, Progress(step=step, position=StreamPosition(1, 2, step), sequence_hash="", world_size=2, validation_nll=nll))
    return path


def test_progress_survives_and_the_best_come_first(tmp_path: Path) -> None:
    for step, nll in ((100, 3.0), (200, 2.0), (300, None), (400, 2.5)):
        make(tmp_path, step, nll)
    assert [found.progress.position for found in checkpoints(tmp_path)] == [StreamPosition(1, 2, step) for step in (100, 200, 300, 400)]
    assert [found.progress.step for found in best_checkpoints(tmp_path, 3)] == [200, 400, 100]
    prune_checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert [found.progress.step for found in checkpoints(tmp_path)] == [200, 400]


def test_a_validation_of_nan_is_worse_than_any_number(tmp_path: Path) -> None:
    for step, nll in ((100, 3.0), (200, 1.0), (300, math.nan), (400, 2.0), (500, 4.0), (600, math.nan)):
        make(tmp_path, step, nll)
    assert [found.progress.step for found in best_checkpoints(tmp_path, 6)] == [200, 400, 100, 500, 600, 300]
    prune_checkpoints(tmp_path, keep_last=1, keep_best=3)
    assert [found.progress.step for found in checkpoints(tmp_path)] == [100, 200, 400, 600]


def test_half_written_checkpoints_are_not_seen_and_are_swept(tmp_path: Path) -> None:
    make(tmp_path, 100, 1.0)
    killed = make(tmp_path, 200, 1.0)
    shutil.move(killed, killed.with_name(f".tmp-{killed.name}"))
    without_progress = checkpoint_path(tmp_path, 300)
    without_progress.mkdir()
    assert [found.progress.step for found in checkpoints(tmp_path)] == [100]
    prune_checkpoints(tmp_path, 1, 1)
    assert not list(tmp_path.glob("checkpoints/.tmp-*"))


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        best_checkpoints(tmp_path, 1)


def test_code_version_names_the_packages() -> None:
    assert code_version()["torch"] == torch.__version__


def save_where_ranks_see_different_files(rank: int, world_size: int, config: RunConfig) -> tuple[set[str], set[str]]:
    from gbla_rec.checkpoint import storage

    file_sizes = storage.file_sizes
    if rank == 1:
        storage.file_sizes = lambda path: {name: size for name, size in file_sizes(path).items() if not name.startswith(".")}
    progress = checkpoints(Path(train_run(rank, world_size, config)))[-1].progress
    return set(progress.file_sizes), set(progress.file_digests)


@pytest.mark.usefixtures("tiny_workspace")
def test_every_file_has_a_digest_where_ranks_list_a_directory_differently(run_ranks: Any, tiny_run: Any) -> None:
    for sizes, digests in run_ranks(save_where_ranks_see_different_files, 2, tiny_run()):
        assert sizes == digests and len(sizes) == 3
