"""The training loop: global batches in a world-size-free order, TorchRec's pipeline, validation, checkpoints."""

import itertools
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gbla_rec import workspace
from gbla_rec.checkpoint.background_save import BackgroundSaver
from gbla_rec.checkpoint.host_placement import describe_host_placement
from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.resume_point import resume_point, set_aside_after
from gbla_rec.checkpoint.run_directory import (
    Checkpoint,
    Progress,
    prune_checkpoints,
    read_config,
    write_text,
)
from gbla_rec.checkpoint.run_lock import RunLock
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.sharding import describe_plan
from gbla_rec.checkpoint.storage import load_checkpoint, save_checkpoint
from gbla_rec.config import RunConfig, TrainingConfig, with_sample_costs
from gbla_rec.data.batch import Batch
from gbla_rec.data.histories import StreamPosition
from gbla_rec.data.stream import TrainingStream
from gbla_rec.training.bad_batch import stop_at
from gbla_rec.training.dense_optimizer import DenseOptimizer, learning_rate_at
from gbla_rec.training.garbage_collection import ScheduledCollection
from gbla_rec.training.preemption import EXIT_STATUS, StopRequest
from gbla_rec.training.prefetch import Prefetcher
from gbla_rec.training.profiling import StepProfiler
from gbla_rec.training.progress import RunLog
from gbla_rec.training.resumed_run import open_run
from gbla_rec.training.step_guard import StepGuard
from gbla_rec.training.step_pipeline import train_steps
from gbla_rec.training.step_window import StepWindow


def unread_context(parts: RunParts) -> list[str]:
    """Context columns of the dataset that the model has no table for."""
    return [column.name for column in parts.dataset.manifest.context if column.name not in parts.config.model.embedding.context_features]


class Trainer:
    """Trains one run on the current process group, from the start or from the newest checkpoint of its directory."""

    def __init__(self, parts: RunParts, run_dir: Path, resume_step: int | None = None, notes: Sequence[str] = ()) -> None:
        """Load the checkpoint of ``resume_step``, else the newest; where ``run_dir`` has none, keep the initial weights of ``parts``.

        ``notes`` go first into the log, as will what is set aside or left unread here.
        """
        config = parts.config
        self.notes = list(notes)
        if unread := unread_context(parts):
            option = f"--model.embedding.context-features {' '.join((*config.model.embedding.context_features, *unread))}"
            self.notes.append(f"context columns that the model does not read: {', '.join(unread)} ({option})")
        self.config, self.run_dir = config, run_dir
        self.parts, self.model = parts, parts.model
        if config.training.compile:
            parts.retriever.history.compile_training()
        dense_parameters = [(name, parameter) for name, parameter in self.parts.retriever.named_parameters() if name.startswith("history.")]
        self.optimizer = DenseOptimizer(dense_parameters, config.optimizer, config.training.num_steps)
        guarded = [parameter for _, parameter in dense_parameters]
        self.guard = StepGuard(self.parts.retriever.table_boundary, guarded, self.parts.device)
        self.optimizer.skip_when(self.guard.is_bad)
        self.stream = TrainingStream(
            self.parts.dataset,
            with_sample_costs(config.stream, config.model, self.parts.semantic_ids.widths),
            seed=config.seed,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            num_micro_batches=config.training.num_micro_batches,
            context=config.model.embedding.context_features,
        )
        self.step, self.position = 0, StreamPosition()
        self.saved_step: int | None = None
        self.background_saver = BackgroundSaver() if config.training.async_save else None
        # one choice for all ranks: they may see the directory at different moments
        found = on_first_rank(lambda: resume_point(run_dir, resume_step))
        if found is not None:
            self._resume(found)
            aside = on_first_rank(lambda: set_aside_after(run_dir, self.step))
            self.notes += [f"set aside as later than step {self.step}: {path}" for path in aside]
        self.prefetcher = Prefetcher(self._steps, config.training.prefetch_factor, start=self._choose_device)
        profiled = config.training.profiled_steps if dist.get_rank() == 0 else range(0)
        self.profiler = StepProfiler(profiled, run_dir, first_step=self.step)
        if passed := self.profiler.passed():
            self.notes.append(passed)
        self.garbage = ScheduledCollection()

    def run(self) -> Path:
        """Train to ``config.training.num_steps``; returns the run directory.

        Raises:
            SystemExit: with status 143 after SIGTERM, once a checkpoint is saved.
        """
        training = self.config.training
        log = RunLog(self.run_dir, num_steps=training.num_steps, first_step=self.step, enabled=dist.get_rank() == 0)
        saver = self.background_saver or nullcontext()
        # the request outlives the saver: SIGTERM must not cut off the last checkpoint
        with StopRequest() as stop_request, log, saver, self.prefetcher, self.profiler, self.garbage:
            kernels = self.config.model.kernels_on(self.parts.device.type)
            for note in self.notes:
                log.message(note)
            log.message(f"run {self.run_dir}, {dist.get_world_size()} rank(s), {kernels} kernels\n{describe_plan(self.model)}")
            placement = self.parts.host_placement() if dist.get_rank() == 0 else None
            if placement is not None:
                log.message(describe_host_placement(placement))
            if self.step >= training.num_steps:
                log.message(f"nothing to do: the run is at step {self.step} of {training.num_steps}")
            self._train(training, log, stop_request)
        return self.run_dir

    def _train(self, training: TrainingConfig, log: RunLog, stop_request: StopRequest) -> None:
        steps = stop_request.stop(self.prefetcher)
        window = StepWindow(torch.zeros((), device=self.parts.device), self.prefetcher.seconds_waited)
        while self.step < training.num_steps:
            stops = [_next_multiple(self.step, every) for every in (training.validate_every, training.save_every)]
            stop = min(*stops, training.num_steps)
            window = self._train_until(stop, steps, window, log)
            self._require_finite()
            if self.step < stop:
                # a second save of one step would drop its validation
                if self.step != self.saved_step:
                    self._save(None)
                if self.background_saver is not None:
                    self.background_saver.wait()
                log.message(f"SIGTERM: saved step {self.step} of {self.run_dir}; train with --resume to go on")
                raise SystemExit(EXIT_STATUS)
            paused = time.monotonic()
            is_validation = stop % training.validate_every == 0 or stop == training.num_steps
            self._save(self._validate(training, log) if is_validation else None)
            self.garbage.collect()
            window.started += time.monotonic() - paused

    def _train_until(self, stop: int, steps: Iterator[list[Batch]], window: StepWindow, log: RunLog) -> StepWindow:
        """Train up to step ``stop``, or until there are no more batches.

        Nothing is in flight before and after, so the model can be read and saved.
        """
        self.model.train()
        stretch = itertools.islice(steps, stop - self.step)
        num_micro_batches = self.config.training.num_micro_batches
        for trained, nll in train_steps(self.model, self.optimizer, self.parts.device, self._forward, stretch, num_micro_batches):
            position = trained[-1].next_position
            assert position is not None
            # once for each backward pass
            for _ in trained:
                self.guard.watch(self.step + 1, self.position)
            self.step, self.position = self.step + 1, position
            window.add(trained, nll, self.config.model, self.parts.semantic_ids.widths)
            self.profiler.step_done()
            self.garbage.after_step(self.step)
            if self.step % self.config.training.log_every == 0 or self.step in (1, self.config.training.num_steps):
                window = self._report(window, log)
        return window

    def _forward(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        # autocast around forward alone: backward follows the dtypes of forward
        with self.parts.autocast():
            loss, nll = self.model(batch)
        return self.guard.protect(loss), nll

    def _steps(self) -> Iterator[list[Batch]]:
        """The micro batches of each step from here on, in page-locked memory where that speeds the copy to the device."""
        for parts in self.stream.steps(self.position):
            batches = [self.parts.collator(part) for part in parts]
            yield [batch.pin_memory() for batch in batches] if self.parts.device.type == "cuda" else batches

    def _choose_device(self) -> None:
        """A new thread starts on GPU 0: page-locked memory would make a context there on every rank."""
        if self.parts.device.type == "cuda":
            torch.cuda.set_device(self.parts.device)

    def _report(self, window: StepWindow, log: RunLog) -> StepWindow:
        self._require_finite()
        seconds_waited = self.prefetcher.seconds_waited
        log.training(
            self.step,
            window.rates(seconds_waited),
            learning_rate=learning_rate_at(self.step - 1, self.config.training.num_steps, self.config.optimizer),
            gradient_norm=float(self.optimizer.gradient_norm),
            tokens=window.tokens,
        )
        return window.after(seconds_waited)

    def _require_finite(self) -> None:
        """Stop all ranks if a step since the last call was not finite."""
        bad = self.guard.first_bad_step()
        if bad is not None:
            stop_at(bad, self.run_dir, self.stream)

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
        if not math.isfinite(mean):
            # on all ranks alike: the totals are of all
            saved = workspace.checkpoint_steps(self.run_dir)
            earlier = f"go back with --resume-step, {self.run_dir} has checkpoints of steps {saved}, or " if saved else ""
            raise FloatingPointError(
                f"the validation NLL after step {self.step} is {mean}: the weights have diverged, and were not saved; {earlier}"
                "start a new run with a lower --optimizer.learning-rate"
            )
        log.validation(self.step, nll=mean, num_targets=int(totals[1]))
        return mean

    def _save(self, validation_nll: float | None) -> None:
        self._require_finite()
        progress = Progress(
            step=self.step,
            position=self.position,
            sequence_hash=self.stream.sequence_hash,
            world_size=dist.get_world_size(),
            validation_nll=validation_nll,
        )
        training, state = self.config.training, self.optimizer.state_tensors()

        def prune() -> None:
            prune_checkpoints(self.run_dir, training.keep_last, training.keep_best)

        if self.background_saver is not None:
            self.background_saver.save(self.run_dir, self.model, state, progress, prune)
        else:
            save_checkpoint(self.run_dir, self.model, state, progress)
            on_first_rank(prune)
        self.saved_step = self.step

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
        self.notes.append(f"resumed from {checkpoint.path}")
        begun_with = read_config(self.run_dir).training.num_micro_batches
        if begun_with != (now := self.config.training.num_micro_batches):
            self.notes.append(f"the tables step {now} time(s) a step: num_micro_batches is {now}, the run began with {begun_with}")
        self.saved_step = self.step


def _next_multiple(step: int, every: int) -> int:
    """The first multiple of ``every`` after ``step``."""
    return (step // every + 1) * every


def train(config: RunConfig, *, device: torch.device, resume: bool = False, resume_step: int | None = None) -> Path:
    """Train a run in the workspace, on the current process group.

    Args:
        config: the run.
        device: of this rank.
        resume: go on with the newest run of this name and config; where it saved nothing, with the newest before it that also has the
            same data, saved something and is not at its end; where there is none, start one.
        resume_step: go on from the checkpoint of this step instead of the newest; those of later steps are set aside.

    Returns:
        The run's directory.

    Raises:
        ValueError: if the run to resume has another config (the message names the fields) or other semantic IDs, if its checkpoint is
            damaged, or if there is no checkpoint of ``resume_step``.
        BlockingIOError: if another training writes the run's directory, and does not end within seconds (``RunLock``); other
            OSErrors, if the directory cannot be written.
    """
    # first: a run that cannot start leaves no run directory behind
    parts = RunParts.open(config, device)
    if parts.dataset.manifest.num_validation_users == 0:
        raise ValueError(
            f"dataset {config.dataset!r} must have users with validation targets, by which checkpoints are chosen, and has none; prepare "
            "longer histories, or with another --split"
        )
    # one choice for all ranks: a run or a checkpoint may appear between the looks of two
    run_dir, notes = on_first_rank(lambda: open_run(config, resume, resume_step, parts.dataset.manifest.content_hash, parts.identity))
    with RunLock(run_dir) as lock:
        trainer = Trainer(parts, run_dir, resume_step, notes)
        on_first_rank(lambda: write_text(run_dir / "plan.txt", describe_plan(trainer.model) + "\n"))
        try:
            return trainer.run()
        finally:
            saver = trainer.background_saver
            if saver is not None and saver.given_up is not None:
                lock.keep_until(saver.given_up)
