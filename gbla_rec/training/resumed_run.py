"""Which directory a training writes: a new one, or that of the run that ``--resume`` goes on with."""

from pathlib import Path

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import create_run, read_config, read_dataset_hash, read_semantic_ids_hash, readable_checkpoints
from gbla_rec.checkpoint.semantic_ids_rule import require_semantic_ids
from gbla_rec.config import RunConfig, differing_fields
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity

CHANGEABLE = frozenset(
    {
        "model.embedding.cache_load_factor",
        "model.embedding.memory_reserve",
        "model.embedding.placement",
        "model.encoder.activation_checkpointing",
        "model.kernels",
        "stream.linear_cost",
        "stream.quadratic_cost",
        "stream.target_cost",
        "training.async_save",
        "training.compile",
        "training.log_every",
        # the tables step differently, but what must fit into fewer devices needs it
        "training.num_micro_batches",
        "training.prefetch_factor",
        "training.profile_steps",
    }
)
"""Settings of how, not what, a run computes: a resumed run may have others."""


def open_run(
    config: RunConfig, resume: bool, resume_step: int | None, dataset_hash: str, semantic_ids: SemanticIdsIdentity
) -> tuple[Path, list[str]]:
    """The directory to train in, and what a person should know of its choice.

    Args:
        config: the run.
        resume: go on with the newest run of this name and config, if there is one.
        resume_step: go back to the checkpoint of this step of such a run.
        dataset_hash: content of the dataset that is there.
        semantic_ids: those that are there.

    Raises:
        ValueError: if no run of this name has this config (the message names the fields), or the run has other semantic IDs.
        FileNotFoundError: if there is no run to go back in.
    """
    notes = []
    if resume or resume_step is not None:
        run_dir = _resumable(config, dataset_hash, semantic_ids, is_going_back=resume_step is not None)
        if run_dir is not None:
            require_semantic_ids(run_dir, semantic_ids)
            return run_dir, []
        if resume_step is not None:
            raise FileNotFoundError(f"--resume-step needs a run called {config.name!r} with a checkpoint, and there is none")
        notes = [f"nothing to resume: no unfinished run called {config.name!r} has a checkpoint; a new run starts"]
    run_dir = workspace.new_run_dir(config.name)
    create_run(run_dir, config, dataset_hash, semantic_ids.content)
    return run_dir, notes


def _resumable(config: RunConfig, dataset_hash: str, semantic_ids: SemanticIdsIdentity, *, is_going_back: bool) -> Path | None:
    """The newest run with this config; if it died before its first save, the newest one like it that is unfinished or to be gone back in.

    Raises:
        ValueError: if there are runs of this name, and none with this config.
    """
    runs = workspace.run_dirs(config.name)
    alike = [run_dir for run_dir in runs if _has_config(run_dir, config)]
    if runs and not alike:
        raise ValueError(
            f"cannot resume {runs[0]}: its config.json differs in {', '.join(_differing(runs[0], config))}, and no older run called "
            f"{config.name!r} has these options; give the same options, or leave {'--resume-step' if is_going_back else '--resume'} out"
        )
    if not alike or workspace.checkpoint_steps(alike[0]):
        return next(iter(alike), None)
    saved = (run_dir for run_dir in alike if workspace.checkpoint_steps(run_dir) and read_dataset_hash(run_dir) == dataset_hash)
    same_ids = (run_dir for run_dir in saved if semantic_ids.covers(read_semantic_ids_hash(run_dir)))
    return next((run_dir for run_dir in same_ids if is_going_back or not _is_finished(run_dir, config)), None)


def _has_config(run_dir: Path, config: RunConfig) -> bool:
    try:
        return not _differing(run_dir, config)
    except ValueError:
        # of another version of the library
        return False


def _is_finished(run_dir: Path, config: RunConfig) -> bool:
    return any(checkpoint.progress.step >= config.training.num_steps for checkpoint in readable_checkpoints(run_dir))


def _differing(run_dir: Path, config: RunConfig) -> list[str]:
    """Settings of what a run computes, in which ``config`` differs from that of the run."""
    return sorted(set(differing_fields(read_config(run_dir), config)) - CHANGEABLE)
