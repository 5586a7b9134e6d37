"""What a run leaves on disk, and how the next command finds it.

::

    config.json  version.json  plan.txt  metrics.jsonl  tensorboard/  lock
    checkpoints/step_00001000/   torch.distributed.checkpoint files and progress.json
    results.json  results.md  per_user.parquet      written by evaluation
"""

import hashlib
import json
import math
import os
import shutil
import subprocess
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gbla_rec import workspace
from gbla_rec.config import RunConfig, from_json, to_json
from gbla_rec.data.histories import StreamPosition

CHECKPOINTS, STEP_PREFIX = workspace.CHECKPOINTS, workspace.STEP_PREFIX
PROGRESS = "progress.json"
RESULTS = "results.json"
RESULTS_TABLE = "results.md"
PER_USER = "per_user.parquet"
METRICS = "metrics.jsonl"
TEMPORARY_PREFIX = ".tmp-"
COMMIT_VARIABLE = "GBLA_REC_COMMIT"
"""Environment variable: the commit that a container image was built from."""
FORMAT_VERSION = 1
"""Of checkpoints; raised when an older version of this package could not read them."""
_WITHOUT_IT = "copy it again, or remove the checkpoint's directory to go on without it"
PACKAGES = ("gbla-rec", "torch", "torchrec", "triton", "polars", "numpy")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a checkpoint stands: steps done, the next sample, and the validation NLL if it was measured.

    ``sequence_hash`` names the order of samples that ``position`` points into; ``file_sizes`` (bytes by name) shows a
    truncated or missing file, ``file_digests`` (SHA-256 by name) an altered one.
    """

    step: int
    position: StreamPosition
    sequence_hash: str
    world_size: int
    validation_nll: float | None = None
    file_sizes: dict[str, int] = field(default_factory=dict)
    file_digests: dict[str, str] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    progress: Progress


def create_run(run_dir: Path, config: RunConfig, dataset_hash: str, semantic_ids_hash: str) -> None:
    """Make the run directory with its resolved config and the versions of code and data.

    Args:
        run_dir: to make.
        config: of the run.
        dataset_hash: content hash of the prepared dataset.
        semantic_ids_hash: ``SemanticIdsIdentity.content`` of the semantic IDs.

    Raises:
        FileExistsError: if it exists.
    """
    (run_dir / CHECKPOINTS).mkdir(parents=True)
    data = {"dataset_hash": dataset_hash, "semantic_ids_hash": semantic_ids_hash}
    (run_dir / "version.json").write_text(json.dumps(code_version() | data, indent=2) + "\n")
    # last: a directory with a config.json is a run
    write_text(run_dir / "config.json", to_json(config))


def read_dataset_hash(run_dir: Path) -> str | None:
    """Content hash of the dataset that a run was made for; None if the run does not say.

    Raises:
        ValueError: if its ``version.json`` is damaged; the message names it.
    """
    return _read_version(run_dir, "dataset_hash")


def read_semantic_ids_hash(run_dir: Path) -> str | None:
    """``SemanticIdsIdentity.content`` of the semantic IDs that a run was trained on; None if the run does not say.

    Raises:
        ValueError: if its ``version.json`` is damaged; the message names it.
    """
    return _read_version(run_dir, "semantic_ids_hash")


def _read_version(run_dir: Path, name: str) -> str | None:
    path = run_dir / "version.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove the run, or restore the file") from error
    return found.get(name) if isinstance(found, dict) else None


def read_config(run_dir: Path) -> RunConfig:
    """The resolved config of a run.

    Raises:
        FileNotFoundError: if ``run_dir`` is no run directory.
        ValueError: if its config is damaged, or has settings that this version does not know; the message names the file.
    """
    path = run_dir / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{run_dir} is not a run directory: it has no config.json")
    try:
        return from_json(RunConfig, path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}; version.json beside it names the commit that wrote it") from error


def code_version() -> dict[str, str | None]:
    """Versions of the packages, and the git commit: that of the checkout (``-dirty`` if changed), else that of the image."""
    return {"commit": _commit(), **{name: _version(name) for name in PACKAGES}}


def _commit() -> str | None:
    # a container image has no git
    if shutil.which("git") is not None:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
        if described.returncode == 0:
            return described.stdout.strip()
    return os.environ.get(COMMIT_VARIABLE) or None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        # run from a checkout that is not installed: the commit says which code it is
        return None


def checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first.

    Raises:
        ValueError: if the progress file of one is damaged; names it.
    """
    found = [Checkpoint(path.parent, read_progress(path)) for path in (run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*/{PROGRESS}")]
    return sorted(found, key=lambda checkpoint: checkpoint.progress.step)


def readable_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """As ``checkpoints``, without those whose progress file is damaged: what is kept need not wait for what is not."""
    found = []
    for path in sorted((run_dir / CHECKPOINTS).glob(f"{STEP_PREFIX}*/{PROGRESS}")):
        with suppress(ValueError):
            found.append(Checkpoint(path.parent, read_progress(path)))
    return sorted(found, key=lambda checkpoint: checkpoint.progress.step)


def describe_run(run_dir: Path) -> str:
    """The directory, and how far its checkpoints go where they stop before the last step."""
    steps, planned = workspace.checkpoint_steps(run_dir), read_config(run_dir).training.num_steps
    if not steps or steps[-1] >= planned:
        return f"run {run_dir}"
    return f"run {run_dir}, not finished: saved at step {steps[-1]:,} of {planned:,} (--run-dir takes another)"


def best_checkpoints(run_dir: Path, count: int) -> list[Checkpoint]:
    """The ``count`` checkpoints of lowest validation NLL, best first; unvalidated ones and those of NaN come last, newest first.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        ValueError: if it has damaged ones alone.
    """
    found = checkpoints(run_dir)
    if not found:
        if workspace.checkpoint_steps(run_dir):
            raise ValueError(f"no checkpoint of {run_dir} has its {PROGRESS}: they are damaged; restore the file, or remove the run")
        raise FileNotFoundError(f"{run_dir} has no checkpoint yet; let it train for longer, or resume it")

    return sorted(found, key=lambda checkpoint: (_rank_nll(checkpoint), -checkpoint.progress.step))[:count]


def _rank_nll(checkpoint: Checkpoint) -> float:
    """The validation NLL to sort by: infinite where there is none, or a NaN, which compares with nothing."""
    nll = checkpoint.progress.validation_nll
    return math.inf if nll is None or math.isnan(nll) else nll


def shortlisted_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """The checkpoints among which an evaluation chooses: all that were kept and validated; the best of ``best_checkpoints`` if none was.

    The newest belong to them: ranking can still improve where the NLL no longer does.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
    """
    validated = [checkpoint for checkpoint in checkpoints(run_dir) if checkpoint.progress.validation_nll is not None]
    return validated or best_checkpoints(run_dir, 1)


def checkpoint_path(run_dir: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` belongs."""
    return run_dir / CHECKPOINTS / f"{STEP_PREFIX}{step:08d}"


def prune_checkpoints(run_dir: Path, keep_last: int, keep_best: int) -> None:
    """Delete all but the newest ``keep_last`` and the best ``keep_best`` checkpoints, and what killed saves left behind.

    A damaged checkpoint, as far as the sizes of its files tell, counts for neither number and stays where it is.
    """
    found = [checkpoint for checkpoint in readable_checkpoints(run_dir) if size_damage(checkpoint) is None]
    validated = [checkpoint for checkpoint in found if checkpoint.progress.validation_nll is not None]
    validated.sort(key=lambda checkpoint: (_rank_nll(checkpoint), checkpoint.progress.step))
    kept = {checkpoint.path for checkpoint in found[-keep_last:] + validated[:keep_best]}
    for path in [checkpoint.path for checkpoint in found if checkpoint.path not in kept]:
        doomed = path.with_name(TEMPORARY_PREFIX + path.name)
        # renamed first: a half-deleted checkpoint must not look complete
        path.rename(doomed)
    for left in (run_dir / CHECKPOINTS).glob(f"{TEMPORARY_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)


def file_sizes(directory: Path) -> dict[str, int]:
    """Bytes of each file of a checkpoint, ``progress.json`` aside."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.name != PROGRESS}


def size_damage(checkpoint: Checkpoint) -> str | None:
    """Which file of a checkpoint is missing, of another size, or not its own; None if none is. Reads no file."""
    wanted, found = checkpoint.progress.file_sizes, file_sizes(checkpoint.path)
    for name, size in wanted.items():
        if found.get(name) != size:
            return f"{name} must have {size} bytes, got {found.get(name, 'no such file')}"
    # a checkpoint of an older version does not list its files
    foreign = sorted(set(found) - set(wanted)) if wanted else []
    return f"it has files that were not saved with it, {', '.join(foreign)} (remove them)" if foreign else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_progress(directory: Path, progress: Progress) -> None:
    """Write ``progress.json``."""
    write_text(directory / PROGRESS, json.dumps(asdict(progress), indent=2) + "\n")


def read_progress(path: Path) -> Progress:
    """Read ``progress.json``.

    Raises:
        ValueError: if it is damaged, or of a later format than this version reads; names the checkpoint.
    """
    directory = path.parent
    try:
        fields = json.loads(path.read_text())
        format_version = int(fields.get("format_version", 1))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"checkpoint {directory} is damaged: {path.name} is not what was saved ({error}); {_WITHOUT_IT}") from error
    if format_version > FORMAT_VERSION:
        raise ValueError(
            f"checkpoint {directory} has format version {format_version}, this gbla-rec reads up to {FORMAT_VERSION}; "
            f"install the version that wrote it (version.json in the run directory), or newer"
        )
    try:
        return Progress(**{**fields, "position": StreamPosition(**fields["position"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {directory} is damaged: {path.name} is not what was saved ({error}); {_WITHOUT_IT}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is either complete or absent, after a power cut too."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{os.getpid()}")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def flush_names(directory: Path) -> None:
    """Force to disk which files a directory has: before older checkpoints are deleted, the newest one must be there to stay."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
