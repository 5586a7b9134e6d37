"""The training loop: global batches in a world-size-free order, TorchRec's pipeline, validation, checkpoints."""

import itertools
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from gbla_rec import workspace
from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.resume_point import resume_point, set_aside_after
from gbla_rec.checkpoint.run_directory import (
    Checkpoint,
    Progress,
    create_run,
    prune_checkpoints,
    read_config,
    write_text,
)
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.sharding import describe_plan
from gbla_rec.checkpoint.storage import load_checkpoint, save_checkpoint
from gbla_rec.config import RunConfig, TrainingConfig, differing_fields, with_sample_costs
from gbla_rec.data.batch import Batch
from gbla_rec.data.histories import StreamPosition
from gbla_rec.data.stream import TrainingStream
from gbla_rec.training.dense_optimizer import DenseOptimizer, learning_rate_at
from gbla_rec.training.preemption import EXIT_STATUS, StopRequest
from gbla_rec.training.progress import RunLog


@dataclass
class _Window:
    """Sums since the last report; the NLL stays on the device until then."""

    nll: Tensor
    targets: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)


class Trainer:
    """Trains one run on the current process group, from the start or from the newest checkpoint of its directory."""

    def __init__(self, parts: RunParts, run_dir: Path, resume_step: int | None = None) -> None:
        """Load the checkpoint of ``resume_step``, else the newest; where ``run_dir`` has none, keep the initial weights of ``parts``."""
        config = parts.config
        self.config, self.run_dir = config, run_dir
        self.parts, self.model = parts, parts.model
        dense_parameters = [(name, parameter) for name, parameter in self.parts.retriever.named_parameters() if name.startswith("history.")]
        self.optimizer = DenseOptimizer(dense_parameters, config.optimizer, config.training.num_steps)
        self.stream = TrainingStream(
            self.parts.dataset,
            with_sample_costs(config.stream, config.model, self.parts.semantic_ids.widths),
            seed=config.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            context=config.model.embedding.context_features,
        )
        self.step, self.position = 0, StreamPosition()
        self.saved_step: int | None = None
        # one choice for all ranks: they may see the directory at different moments
        found = on_first_rank(lambda: resume_point(run_dir, resume_step))
        if found is not None:
            self._resume(found)
            on_first_rank(lambda: set_aside_after(run_dir, self.step))

    def run(self) -> Path:
        """Train to ``config.training.num_steps``; returns the run directory.

        Raises:
            SystemExit: with status 143 after SIGTERM, once a checkpoint is saved.
        """
        training = self.config.training
        log = RunLog(self.run_dir, num_steps=training.num_steps, first_step=self.step, enabled=dist.get_rank() == 0)
        with log, StopRequest() as stop_request:
            log.message(f"run {self.run_dir}, {dist.get_world_size()} rank(s)\n{describe_plan(self.model)}")
            self._train(training, log, stop_request)
        return self.run_dir

    def _train(self, training: TrainingConfig, log: RunLog, stop_request: StopRequest) -> None:
        batches = self._batches(stop_request)
        window = _Window(torch.zeros((), device=self.parts.device))
        while self.step < training.num_steps:
            stops = [_next_multiple(self.step, every) for every in (training.validate_every, training.save_every)]
            stop = min(*stops, training.num_steps)
            window = self._train_until(stop, batches, window, log)
            self._require_finite(window)
            if self.step < stop:
                # a second save of one step would drop its validation
                if self.step != self.saved_step:
                    self._save(None)
                log.message(f"SIGTERM: saved step {self.step} of {self.run_dir}; train with --resume to go on")
                raise SystemExit(EXIT_STATUS)
            paused = time.monotonic()
            is_validation = stop % training.validate_every == 0 or stop == training.num_steps
            self._save(self._validate(training, log) if is_validation else None)
            window.started += time.monotonic() - paused

    def _train_until(self, stop: int, batches: Iterator[Batch], window: _Window, log: RunLog) -> _Window:
        """Train up to step ``stop``, or until there are no more batches.

        Nothing is in flight before and after, so the model can be read and saved.
        """
        in_flight: deque[Batch] = deque()
        stretch = _remember(itertools.islice(batches, stop - self.step), in_flight)
        # the pipeline asks for zero_grad and step only
        optimizer = cast(torch.optim.Optimizer, self.optimizer)
        pipeline: TrainPipelineSparseDist[Batch, Tensor] = TrainPipelineSparseDist(
            self.model, optimizer, self.parts.device, custom_model_fwd=self._forward
        )
        self.model.train()
        while self.step < stop:
            try:
                nll = pipeline.progress(stretch)
            except StopIteration:
                break
            batch = in_flight.popleft()
            assert batch.next_position is not None
            self.step, self.position = self.step + 1, batch.next_position
            window.nll += nll.sum()
            window.targets += batch.num_global_targets
            window.tokens += batch.num_global_tokens
            if self.step % self.config.training.log_every == 0 or self.step in (1, self.config.training.num_steps):
                window = self._report(window, log)
        pipeline.detach()
        return window

    def _forward(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        # autocast around forward alone: backward follows the dtypes of forward
        with self.parts.autocast():
            loss, nll = self.model(batch)
        return loss, nll

    def _batches(self, stop_request: StopRequest) -> Iterator[Batch]:
        for histories in self.stream.batches(self.position):
            if stop_request.is_due():
                return
            yield self.parts.collator(histories)

    def _report(self, window: _Window, log: RunLog) -> _Window:
        self._require_finite(window)
        total = window.nll.clone()
        dist.all_reduce(total)
        loss = float(total) / max(window.targets, 1)
        log.training(
            self.step,
            loss=loss,
            tokens_per_second=window.tokens / (time.monotonic() - window.started),
            learning_rate=learning_rate_at(self.step - 1, self.config.training.num_steps, self.config.optimizer),
            gradient_norm=float(self.optimizer.gradient_norm),
            tokens=window.tokens,
        )
        return _Window(torch.zeros_like(window.nll))

    def _require_finite(self, window: _Window) -> None:
        """Stop all ranks before a bad state is saved: the newest checkpoint stays a good one."""
        is_bad = (~torch.isfinite(window.nll)).to(torch.float32)
        dist.all_reduce(is_bad)
        if float(is_bad) > 0:
            raise FloatingPointError(
                f"the loss is not finite at or before step {self.step}, nothing was saved since the newest checkpoint of {self.run_dir}; "
                "start a new run with a lower --optimizer.learning-rate"
            )

    @torch.no_grad()
    def _validate(self, training: TrainingConfig, log: RunLog) -> float:
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.parts.device)
        for _, batch in self.parts.evaluation_batches("validation", self.config.evaluation.tokens_per_batch, training.validation_users):
            with self.parts.autocast():
                _, nll = self.parts.retriever(batch)
            totals += torch.stack((nll.sum().double(), torch.tensor(nll.numel(), dtype=torch.float64, device=nll.device)))
        dist.all_reduce(totals)
        if float(totals[1]) == 0:
            raise ValueError(f"dataset {self.config.dataset!r} has no validation targets; prepare it with another split")
        mean = float(totals[0] / totals[1])
        log.validation(self.step, nll=mean, num_targets=int(totals[1]))
        return mean

    def _save(self, validation_nll: float | None) -> None:
        progress = Progress(
            step=self.step,
            position=self.position,
            sequence_hash=self.stream.sequence_hash,
            world_size=dist.get_world_size(),
            validation_nll=validation_nll,
        )
        save_checkpoint(self.run_dir, self.model, self.optimizer.state_tensors(), progress)
        self.saved_step = self.step
        training = self.config.training
        on_first_rank(lambda: prune_checkpoints(self.run_dir, training.keep_last, training.keep_best))

    def _resume(self, checkpoint: Checkpoint) -> None:
        if checkpoint.progress.sequence_hash != self.stream.sequence_hash:
            raise ValueError(
                f"cannot resume {checkpoint.path}: the dataset was prepared anew or the stream settings changed, so its position "
                "points into another order of samples; start a new run by leaving --resume out"
            )
        state: dict[str, Any] = self.optimizer.state_tensors()
        load_checkpoint(checkpoint, self.model, state)
        self.optimizer.load_state_tensors(state, checkpoint.progress.step)
        self.step, self.position = checkpoint.progress.step, checkpoint.progress.position
        self.saved_step = self.step


def _next_multiple(step: int, every: int) -> int:
    """The first multiple of ``every`` after ``step``."""
    return (step // every + 1) * every


def _remember(batches: Iterator[Batch], in_flight: deque[Batch]) -> Iterator[Batch]:
    """Pass batches on and keep them in order: the pipeline takes them some steps before it trains on them."""
    for batch in batches:
        in_flight.append(batch)
        yield batch


def train(config: RunConfig, *, device: torch.device, resume: bool = False, resume_step: int | None = None) -> Path:
    """Train a run in the workspace, on the current process group.

    Args:
        config: the run.
        device: of this rank.
        resume: go on with the newest run of this name (its config must be the same), or start one if there is none.
        resume_step: go on from the checkpoint of this step instead of the newest; those of later steps are set aside.

    Returns:
        The run's directory.

    Raises:
        ValueError: if the run to resume has another config (the message names the fields), if its checkpoint is damaged, or if there
            is no checkpoint of ``resume_step``.
    """
    # first: a run that cannot start leaves no run directory behind
    parts = RunParts.open(config, device)
    run_dir = on_first_rank(lambda: _open_run(config, resume, resume_step, parts.dataset.manifest.content_hash))
    trainer = Trainer(parts, run_dir, resume_step)
    on_first_rank(lambda: write_text(run_dir / "plan.txt", describe_plan(trainer.model) + "\n"))
    return trainer.run()


def _open_run(config: RunConfig, resume: bool, resume_step: int | None, dataset_hash: str) -> Path:
    if resume or resume_step is not None:
        try:
            run_dir = workspace.latest_run_dir(config.name)
        except FileNotFoundError:
            if resume_step is not None:
                raise
        else:
            differing = differing_fields(read_config(run_dir), config)
            if differing:
                raise ValueError(
                    f"cannot resume {run_dir}: its config.json differs in {', '.join(differing)}; give the same options, "
                    "or leave --resume out"
                )
            return run_dir
    run_dir = workspace.new_run_dir(config.name)
    create_run(run_dir, config, dataset_hash)
    return run_dir
