"""Runs the stages of many jobs as parallel processes, and ends before a time limit with everything saved."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import IO, Any, Protocol

from benchmarks.quality.attempts import Attempt, add_attempt, machine
from gbla_rec.data.file_lock import take_lock

INTERRUPTED_STATUSES = (-signal.SIGTERM, 128 + signal.SIGTERM)
"""Of a process that SIGTERM ended: before its handler was there, and after it saved."""
KILL_SECONDS = 2.0
"""What is still running so long before the limit is killed."""
FIRST_PART = 0.9
"""Whatever a stage needs, it may start while so much of the time is left."""
POLL_SECONDS = 0.1
LOCK = "lock"


class State(StrEnum):
    """Where a job stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    ELSEWHERE = "running elsewhere"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One process of a job.

    Attributes:
        name: names the log, ``<job directory>/<name>.log``.
        command: program and arguments.
        needed_seconds: it is not started with less time left, unless nearly all of the limit is.
        saves_on_sigterm: whether what it did so far is worth stopping it early for.
        urgency: stages of higher urgency start first.
    """

    name: str
    command: tuple[str, ...]
    needed_seconds: float = 0.0
    saves_on_sigterm: bool = False
    urgency: int = 0


class Job(Protocol):
    """Anything that knows from what lies on disk which stage comes next."""

    @property
    def name(self) -> str:
        """Unique among the jobs."""

    @property
    def directory(self) -> Path:
        """Logs, attempts and the lock."""

    def next_stage(self) -> Stage | None:
        """The stage to run now; None if the job is done."""


@dataclass
class _Running:
    job: Job
    stage: Stage
    slot: int
    process: subprocess.Popen[bytes]
    lock: IO[str]
    started: float
    share_seconds: float = 0.0
    was_stopped: bool = False


@dataclass
class Outcome:
    """What a call to ``run_jobs`` left: the state of every job, and per failed job why."""

    states: dict[str, State] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    logs: dict[str, Path] = field(default_factory=dict)

    def count(self, state: State) -> int:
        """How many jobs are in ``state``."""
        return sum(found is state for found in self.states.values())


class Scheduler:
    """Starts stages in free slots until the time is over; all state of a job is on disk."""

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        num_parallel: int,
        seconds: float,
        grace_seconds: float = 30.0,
        environments: Sequence[Mapping[str, str]] = (),
        report: Callable[[str], None] = print,
        report_every: float = 15.0,
    ) -> None:
        """Take the jobs in the order of preference.

        Args:
            jobs: with unique names.
            num_parallel: processes at a time.
            seconds: until ``run`` must have returned.
            grace_seconds: before that, trainings are asked to save and end.
            environments: of the processes, slot ``i`` gets entry ``i`` modulo their number; empty: this process's own.
            report: takes the progress lines.
            report_every: seconds between them.

        Raises:
            ValueError: if a number is out of range or two jobs have one name.
        """
        if num_parallel < 1:
            raise ValueError(f"num_parallel must be at least 1, got {num_parallel}")
        if not KILL_SECONDS < grace_seconds < seconds:
            raise ValueError(
                f"grace_seconds must be more than {KILL_SECONDS:g} and less than seconds, which is {seconds:g}, got {grace_seconds:g}"
            )
        if len({job.name for job in jobs}) != len(jobs):
            raise ValueError(f"jobs must have unique names, got {sorted(job.name for job in jobs)}")
        self.jobs = list(jobs)
        self.num_parallel = num_parallel
        self.started = time.monotonic()
        self.kill_at = self.started + seconds - KILL_SECONDS
        self.stop_at = self.started + seconds - grace_seconds
        self.environments = [dict(environment) for environment in environments] or [dict(os.environ)]
        self.report, self.report_every = report, report_every
        self.outcome = Outcome()
        self.waiting: dict[str, tuple[Job, Stage]] = {}
        self.running: dict[str, _Running] = {}
        self._is_stopping = False

    def run(self) -> Outcome:
        """Run until all jobs are done or failed, the time is over, or SIGTERM or SIGINT comes; then nothing is left running."""
        for job in self.jobs:
            self._queue(job, None)
        previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            self._loop()
        finally:
            # an error of ours must not leave processes behind
            for running in self.running.values():
                os.killpg(running.process.pid, signal.SIGKILL)
                running.process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)
        return self.outcome

    def _loop(self) -> None:
        now = next_report = time.monotonic()
        while True:
            before, now = now, time.monotonic()
            for running in list(self.running.values()):
                running.share_seconds += (now - before) / len(self.running)
                self._collect(running)
            self._stop_what_is_due(now)
            if not self._is_stopping and now < self.stop_at:
                self._fill_slots(now)
            if now >= next_report:
                self._report_progress(now)
                next_report = now + self.report_every
            if not self.running:
                break
            time.sleep(POLL_SECONDS)

    def _queue(self, job: Job, finished: Stage | None) -> None:
        """Look up what comes next for ``job``, whose stage ``finished`` has just ended well."""
        stage = job.next_stage()
        if stage is None:
            self.outcome.states[job.name] = State.DONE
        elif finished is not None and stage.name == finished.name:
            self._fail(job, stage, f"{stage.name} ended with status 0, but what it must leave is not there")
        else:
            self.outcome.states[job.name] = State.WAITING
            self.waiting[job.name] = (job, stage)

    def _fill_slots(self, now: float) -> None:
        # sorted is stable: the jobs' own order decides between equally urgent stages
        for job, stage in sorted(self.waiting.values(), key=lambda pair: -pair[1].urgency):
            if len(self.running) == self.num_parallel:
                return
            # capped: what needs more than a whole limit is tried once with all of it
            if self.stop_at - now >= min(stage.needed_seconds, FIRST_PART * (self.stop_at - self.started)):
                self._start(job, stage)

    def _start(self, job: Job, stage: Stage) -> None:
        del self.waiting[job.name]
        job.directory.mkdir(parents=True, exist_ok=True)
        lock = (job.directory / LOCK).open("w")
        if not take_lock(lock):
            lock.close()
            self.outcome.states[job.name] = State.ELSEWHERE
            self.report(f"{job.name}: left out, a process of another call still works on it")
            return
        # looked up again under the lock: another call may have gone on with it
        now_due = job.next_stage()
        if now_due is None:
            lock.close()
            self.outcome.states[job.name] = State.DONE
            return
        stage = now_due
        slot = min(set(range(self.num_parallel)) - {running.slot for running in self.running.values()})
        log = job.directory / f"{stage.name}.log"
        with log.open("ab") as output:
            output.write(f"\n$ {' '.join(stage.command)}\n".encode())
            output.flush()
            process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environments[slot % len(self.environments)],
                # a session of its own: an interrupt from the keyboard comes to us, and we let it save
                start_new_session=True,
                # the lock lives as long as the process, even if we are killed
                pass_fds=(lock.fileno(),),
            )
        self.outcome.states[job.name], self.outcome.logs[job.name] = State.RUNNING, log
        self.running[job.name] = _Running(job, stage, slot, process, lock, time.monotonic())

    def _collect(self, running: _Running) -> None:
        """Take a process that has ended off the list."""
        status = running.process.poll()
        if status is None:
            return
        job, stage = running.job, running.stage
        del self.running[job.name]
        running.lock.close()
        seconds = time.monotonic() - running.started
        ended = datetime.now(UTC).isoformat(timespec="seconds")
        add_attempt(job.directory, Attempt(stage.name, ended, seconds, running.share_seconds, status, running.was_stopped, machine()))
        if status == 0:
            self.report(f"{job.name}: {stage.name} done in {seconds:.0f} s")
            self._queue(job, stage)
        elif running.was_stopped or status in INTERRUPTED_STATUSES:
            self.report(f"{job.name}: {stage.name} stopped after {seconds:.0f} s, status {status}")
            self.outcome.states[job.name] = State.WAITING
        else:
            self._fail(job, stage, f"{stage.name} ended with status {status} after {seconds:.0f} s")

    def _fail(self, job: Job, stage: Stage, reason: str) -> None:
        self.outcome.states[job.name], self.outcome.failures[job.name] = State.FAILED, reason
        self.outcome.logs.setdefault(job.name, job.directory / f"{stage.name}.log")
        self.report(f"{job.name}: FAILED, {reason}")

    def _stop_what_is_due(self, now: float) -> None:
        for running in self.running.values():
            due = self.stop_at if running.stage.saves_on_sigterm else self.kill_at
            if not running.was_stopped and (self._is_stopping or now >= due):
                running.was_stopped = True
                running.process.terminate()
            elif now >= self.kill_at:
                os.killpg(running.process.pid, signal.SIGKILL)

    def _handle(self, number: int, frame: Any) -> None:
        self._is_stopping = True
        self.kill_at = min(self.kill_at, time.monotonic() + self.kill_at - self.stop_at)

    def _report_progress(self, now: float) -> None:
        counts = [f"{self.outcome.count(state)} {state}" for state in State if self.outcome.count(state)]
        self.report(f"{now - self.started:.0f} s: {', '.join(counts)}; {max(self.stop_at - now, 0):.0f} s left")
