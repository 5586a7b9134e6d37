"""A checkpoint that is damaged, or of another model, is refused by name on all ranks; a run goes on from an older one when asked to."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gbla_rec.checkpoint.resume_point import resume_point, set_aside_after
from gbla_rec.checkpoint.run_directory import (
    FORMAT_VERSION,
    Progress,
    checkpoint_path,
    checkpoints,
    file_digest,
    file_sizes,
    prune_checkpoints,
    write_progress,
)
from gbla_rec.config import RunConfig, TrainingConfig
from gbla_rec.data.histories import StreamPosition

CPU = torch.device("cpu")
Damage = Callable[[Path], object]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


DAMAGES: dict[str, tuple[Damage, str]] = {
    "metadata": (lambda path: (path / ".metadata").unlink(), r"\.metadata must have \d+ bytes, got no such file"),
    "rank file": (lambda path: (path / "__1_0.distcp").unlink(), r"__1_0\.distcp must have \d+ bytes, got no such file"),
    "truncated": (lambda path: (path / "__0_0.distcp").write_bytes(b"PK"), r"__0_0\.distcp must have \d+ bytes, got 2"),
    "altered": (lambda path: flip_a_byte(path / "__1_0.distcp"), r"the content of __1_0\.distcp is not what was saved \(SHA-256\)"),
    "altered metadata": (lambda path: flip_a_byte(path / ".metadata"), r"the content of \.metadata is not what was saved"),
    "extra": (lambda path: (path / "__2_0.distcp").write_bytes(b"x"), r"files that were not saved with it, __2_0\.distcp"),
}


def refusals(rank: int, world_size: int, config: RunConfig) -> dict[str, str]:
    """Train, then damage the newest checkpoint in each way and read it; what each rank is told."""
    import torch.distributed as dist

    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.checkpoint.storage import load_checkpoint
    from gbla_rec.training.trainer import train

    run_dir = train(config, device=CPU)
    newest = checkpoints(run_dir)[-1]
    parts = RunParts.open(config, CPU)
    told = {}

    def attempt(name: str, damage: Damage, load: Callable[[], object]) -> None:
        originals = {path: path.read_bytes() for path in newest.path.iterdir()}
        dist.barrier()
        if rank == 0:
            damage(newest.path)
        dist.barrier()
        with pytest.raises(ValueError) as refused:
            load()
        told[name] = str(refused.value)
        dist.barrier()
        if rank == 0:
            for path in newest.path.iterdir():
                path.unlink()
            for path, content in originals.items():
                path.write_bytes(content)
        dist.barrier()

    for name, (damage, _) in DAMAGES.items():
        attempt(name, damage, lambda: load_checkpoint(newest, parts.model, None))
    attempt("resume", lambda path: flip_a_byte(path / "__0_0.distcp"), lambda: train(config, device=CPU, resume=True))
    attempt("progress", lambda path: (path / "progress.json").write_text("{"), lambda: train(config, device=CPU, resume=True))
    later = FORMAT_VERSION + 1
    attempt("later", lambda path: rewrite(path / "progress.json", format_version=later), lambda: train(config, device=CPU, resume=True))
    for name, encoder in (
        ("wider", dataclasses.replace(config.model.encoder, model_dim=32)),
        ("shallower", dataclasses.replace(config.model.encoder, pattern="S")),
    ):
        other = RunParts.open(dataclasses.replace(config, model=dataclasses.replace(config.model, encoder=encoder)), CPU)
        attempt(name, lambda path: None, lambda other=other: load_checkpoint(newest, other.model, None))
    load_checkpoint(newest, parts.model, None)
    return told


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(120)
def test_every_damage_is_refused_by_name_on_all_ranks(run_ranks: Any, tiny_run: Any) -> None:
    first, second = run_ranks(refusals, 2, tiny_run())
    assert first == second
    # steps 3, 4 and 6 were kept
    for name, (_, match) in DAMAGES.items():
        message = first[name]
        assert re.search(rf"checkpoint .*step_00000006 is damaged: .*{match}", message), (name, message)
        assert "step_00000004 is whole: copy this one again, or train with --resume-step 4" in message
    assert "step_00000006 is damaged: the content of __0_0.distcp" in first["resume"] and "--resume-step 4" in first["resume"]
    assert "step_00000006 is damaged: progress.json is not what was saved" in first["progress"]
    assert f"has format version {FORMAT_VERSION + 1}, this gbla-rec reads up to {FORMAT_VERSION}" in first["later"]
    assert "belongs to another model or sharding" in first["wider"]
    assert re.search(r"model\.history\.\S+ \(8, 16\) where \(8, 32\) is wanted", first["wider"]), first["wider"]
    assert re.search(r"model\.history\.encoder\.blocks\.1\.\S+ \(\S.*\) where there is none", first["shallower"]), first["shallower"]


def go_on_from_an_older_one(rank: int, world_size: int, config: RunConfig) -> dict[str, Any]:
    """Train, spoil the newest and the oldest checkpoint, and go on from the one between."""
    import torch.distributed as dist

    from gbla_rec.training.trainer import train

    run_dir = train(config, device=CPU)
    losses = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    dist.barrier()
    if rank == 0:
        flip_a_byte(checkpoints(run_dir)[-1].path / "__0_0.distcp")
        next(checkpoints(run_dir)[0].path.glob("*.distcp")).unlink()
        evaluated(run_dir, 6)
    dist.barrier()
    with pytest.raises(ValueError, match="must be a step with a checkpoint"):
        train(config, device=CPU, resume_step=5)
    # what is refused sets nothing aside
    assert (run_dir / "results.json").exists()
    dist.barrier()
    assert train(config, device=CPU, resume_step=4) == run_dir
    dist.barrier()
    again = [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "loss" in line]
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    return {"losses": losses, "again": again, "names": names, "evaluation": evaluation_files(run_dir)}


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(120)
def test_a_run_goes_on_from_the_chosen_step_and_sets_later_ones_aside(run_ranks: Any, tiny_run: Any, tmp_path: Path) -> None:
    training = TrainingConfig(num_steps=6, validate_every=6, save_every=2, log_every=1, validation_users=5, keep_last=3, keep_best=1)
    found = run_ranks(go_on_from_an_older_one, 2, tiny_run(training=training))[0]
    assert found["again"] == pytest.approx(found["losses"], rel=1e-12) and len(found["again"]) == 6
    # the damaged oldest one is left for a person to look at
    assert found["names"] == ["set-aside-step_00000006", "step_00000002", "step_00000004", "step_00000006"]
    assert found["evaluation"] == SET_ASIDE
    log = (tmp_path / "ranks-0" / "0.output").read_text()
    logged = re.findall(r"set aside as later than step 4: .*/(set-aside-\S+)\n", log)
    assert sorted(logged) == [*SET_ASIDE, "set-aside-step_00000006"]


EVALUATION = ["per_user.parquet", "results.json", "results.md"]
SET_ASIDE = [f"set-aside-{name}" for name in EVALUATION]


def evaluated(run_dir: Path, *steps: int) -> None:
    """Leave the files of an evaluation that chose the checkpoint of the first of ``steps`` among all of them."""
    for name in EVALUATION:
        (run_dir / name).write_text(name)
    names = [checkpoint_path(run_dir, step).name for step in steps]
    (run_dir / "results.json").write_text(json.dumps({"checkpoint": names[0], "shortlist_validation_recall": dict.fromkeys(names, 0.5)}))


def evaluation_files(run_dir: Path) -> list[str]:
    return sorted(path.name for path in run_dir.iterdir() if path.name.endswith(tuple(EVALUATION)))


@pytest.mark.parametrize(("steps", "stays"), [((10,), True), ((20, 10), True), ((30, 20), False), ((20, 30), False), ((), False)])
def test_results_of_checkpoints_that_are_set_aside_do_not_stay(tmp_path: Path, steps: tuple[int, ...], stays: bool) -> None:
    for step in (10, 20):
        make(tmp_path, step)
    if steps:
        evaluated(tmp_path, *steps)
    else:
        (tmp_path / "results.json").write_text("{")
    # that of step 30 was removed by hand: the results of it are as stale
    moved = set_aside_after(tmp_path, 20)
    assert evaluation_files(tmp_path) == (EVALUATION if stays else SET_ASIDE if steps else ["set-aside-results.json"])
    assert len(moved) == (0 if stays else 3 if steps else 1)


def test_what_a_killed_first_evaluation_left_does_not_stay(tmp_path: Path) -> None:
    make(tmp_path, 10)
    assert set_aside_after(tmp_path, 10) == []
    (tmp_path / "results.md").write_text("")
    assert set_aside_after(tmp_path, 10) == [tmp_path / "set-aside-results.md"]


def make(run_dir: Path, step: int, nll: float | None = None) -> Path:
    path = checkpoint_path(run_dir, step)
    path.mkdir(parents=True)
    (path / "data").write_text(f"{step}")
    progress = Progress(step=step, position=StreamPosition(), sequence_hash="", world_size=1, validation_nll=nll)
    write_progress(path, dataclasses.replace(progress, file_sizes=file_sizes(path), file_digests={"data": file_digest(path / "data")}))
    return path


def test_pruning_never_counts_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step, nll in ((10, 3.0), (20, 2.0), (30, 1.0), (40, None)):
        make(tmp_path, step, nll)
    (checkpoint_path(tmp_path, 30) / "data").write_text("")
    (checkpoint_path(tmp_path, 40) / "data").unlink()
    prune_checkpoints(tmp_path, keep_last=1, keep_best=1)
    # 20 is the newest and the best that is whole; the damaged ones stay for a person to look at
    assert [found.progress.step for found in checkpoints(tmp_path)] == [20, 30, 40]
    (checkpoint_path(tmp_path, 30) / "progress.json").write_text("{")
    prune_checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert checkpoint_path(tmp_path, 20).exists() and checkpoint_path(tmp_path, 30).exists()


def test_a_newest_checkpoint_without_progress_is_not_passed_over(tmp_path: Path) -> None:
    assert resume_point(tmp_path) is None
    make(tmp_path, 10)
    make(tmp_path, 20)
    found = resume_point(tmp_path)
    assert found is not None and found.progress.step == 20
    (found.path / "progress.json").unlink()
    with pytest.raises(ValueError, match=r"step_00000020 is damaged: it has no progress.json; .* --resume-step 10"):
        resume_point(tmp_path)
    older = resume_point(tmp_path, 10)
    assert older is not None and older.progress.step == 10
    with pytest.raises(ValueError, match=r"--resume-step must be a step with a checkpoint .* \[10, 20\], got 15"):
        resume_point(tmp_path, 15)


def test_what_is_set_aside_is_never_overwritten(tmp_path: Path) -> None:
    make(tmp_path, 10)
    for content in ("first", "second"):
        (make(tmp_path, 20) / "data").write_text(content)
        set_aside_after(tmp_path, 10)
    kept = sorted((tmp_path / "checkpoints").glob("set-aside-*/data"))
    assert [path.read_text() for path in kept] == ["first", "second"]
    prune_checkpoints(tmp_path, 1, 1)
    assert len(list((tmp_path / "checkpoints").glob("set-aside-*"))) == 2
    assert [found.progress.step for found in checkpoints(tmp_path)] == [10]
