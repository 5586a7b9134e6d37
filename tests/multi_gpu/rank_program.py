"""What torchrun starts in these tests: one process group does a list of jobs one after another, and rank 0 writes what came out.

``rank_program.py DIRECTORY`` reads ``DIRECTORY/jobs`` (a pickled list of dicts) and writes ``DIRECTORY/results.json``. A job has a
``name``, a ``kind`` (``train`` or ``evaluate``) and, for training, ``config``, ``is_fp32``, and any of ``resume``, ``last_step``
(die like a killed process after the checkpoint of this step), ``kill_at`` and ``terminate_at`` (signals of the last rank, in the
first attempt, in the middle of this step).
"""

import gc
import json
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from gbla_apps import command_line
from gbla_rec import workspace
from gbla_rec.checkpoint import run_parts
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.evaluation import evaluate as evaluation
from gbla_rec.models.embeddings import initialize_tables
from gbla_rec.training.trainer import Trainer, train

SIGNAL_SECONDS = 2.0
"""For a signal to go from a rank through torchrun to all ranks, which wait for that rank meanwhile."""


class StoppedOnPurposeError(Exception):
    """Ends a run after a checkpoint."""


def main(arguments: Sequence[str]) -> None:
    directory = Path(arguments[0])
    jobs = pickle.loads((directory / "jobs").read_bytes())
    results = {}
    with process_group() as device:
        for job in jobs:
            results[job["name"]] = train_job(job, device) if job["kind"] == "train" else evaluate_job(job, device)
            gc.collect()
            torch.cuda.empty_cache()
        if dist.get_rank() == 0:
            (directory / "results.json").write_text(json.dumps(results))


def train_job(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train; what rank 0 logged of all steps of the run, the change of the tables, and which attempt of torchrun this is."""
    outcome: dict[str, Any] = {"attempt": int(os.environ["TORCHELASTIC_RESTART_COUNT"])}
    with ExitStack() as stack:
        if job["is_fp32"]:
            stack.enter_context(mock.patch.object(run_parts, "autocast", lambda device: nullcontext()))
        stack.enter_context(replaced(Trainer, "_save", lambda save: stopping_save(save, job.get("last_step"))))
        stack.enter_context(replaced(Trainer, "_forward", lambda forward: signalling_forward(forward, job)))
        stack.enter_context(replaced(Trainer, "run", lambda run: measuring_run(run, outcome)))
        try:
            train(job["config"], device=device, resume=job.get("resume", False))
        except StoppedOnPurposeError:
            pass
    run_dir = workspace.latest_run_dir(job["config"].name)
    if dist.get_rank() == 0:
        outcome |= {"run_dir": str(run_dir), "plan": (run_dir / "plan.txt").read_text(), **logged(run_dir)}
    return outcome


@contextmanager
def replaced(owner: Any, name: str, replacement: Callable[[Any], Any]) -> Iterator[None]:
    with mock.patch.object(owner, name, replacement(getattr(owner, name))):
        yield


def stopping_save(save: Any, last_step: int | None) -> Any:
    def save_and_stop(self: Trainer, nll: float | None) -> None:
        save(self, nll)
        if self.step == last_step:
            raise StoppedOnPurposeError

    return save_and_stop


def signalling_forward(forward: Any, job: dict[str, Any]) -> Any:
    is_signaller = dist.get_rank() == dist.get_world_size() - 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def forward_and_signal(self: Trainer, batch: Any) -> Any:
        outputs = forward(self, batch)
        # the other ranks are in the middle of this step: they wait for this one in backward
        if is_signaller and self.step + 1 == job.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        if is_signaller and self.step + 1 == job.get("terminate_at"):
            os.kill(os.getppid(), signal.SIGTERM)
            time.sleep(SIGNAL_SECONDS)
        return outputs

    return forward_and_signal


def measuring_run(run: Any, outcome: dict[str, Any]) -> Any:
    def run_and_measure(self: Trainer) -> Path:
        run_dir = run(self)
        outcome["table_change"] = table_change(self)
        return Path(run_dir)

    return run_and_measure


def table_change(trainer: Trainer) -> float:
    """How far training moved the item tables from their initial weights: the Euclidean norm over all shards of all ranks."""
    tables = trainer.parts.retriever.tables
    shards = {name: value.local_shards() for name, value in tables.state_dict().items() if "item_hash" in name}
    after = {name: [shard.tensor.clone() for shard in local] for name, local in shards.items()}
    initialize_tables(tables, trainer.config.seed)
    total = torch.zeros((), dtype=torch.float64, device=trainer.parts.device)
    for name, local in shards.items():
        for shard, trained in zip(local, after[name], strict=True):
            total += (trained - shard.tensor).double().square().sum()
    dist.all_reduce(total)
    return float(total.sqrt())


def logged(run_dir: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    return {
        "steps": [line["step"] for line in trained],
        "losses": [line["loss"] for line in trained],
        "gradient_norms": [line["gradient_norm"] for line in trained],
        "nll": [line["nll"] for line in lines if line["kind"] == "validation"],
    }


def evaluate_job(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Evaluate the newest run of a name: ``results.json`` without the place of the run."""
    run_dir = workspace.latest_run_dir(job["run"], with_checkpoint=True)
    evaluation.evaluate(run_dir, device=device)
    results = json.loads((run_dir / "results.json").read_text())
    assert results.pop("run") == str(run_dir)
    return {"results": results}


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
