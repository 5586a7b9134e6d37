"""A Chrome trace of some steps: open it in ui.perfetto.dev or chrome://tracing.

Ranges name the parts of a step: ``tables``, ``encoder.S``, ``encoder.G``, ``encoder.W``, ``encoder.ffn``, ``decoder`` and ``loss``
(``gbla_rec/models/step_parts.py``), and TorchRec's ``## forward ##``, ``## backward ##``, ``## optimizer ##``.
"""

from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule


class StepProfiler:
    """Records the steps of a range with torch.profiler and writes ``trace_<first>-<last>.json.gz``; nothing outside of it.

    A context manager; a run that ends inside the range writes what there is. ``first`` is the first step that was not done before.
    """

    def __init__(self, steps: range, directory: Path, *, first_step: int) -> None:
        """Describe the profile.

        Args:
            steps: to record, 1 is a run's first; empty records nothing.
            directory: where the trace goes.
            first_step: steps done before.
        """
        # a resumed run records what is left, and must not replace the trace of what is not
        self.path = _trace_path(directory, max(steps.start, first_step + 1), steps)
        self._path_of_all = _trace_path(directory, steps.start, steps)
        self._steps, self._step = steps, first_step
        self._profiler: Any = None

    def passed(self) -> str | None:
        """What to tell of the wanted steps that were done before, which a resumed run cannot record; None if there are none."""
        last = min(self._steps.stop - 1, self._step)
        if last < self._steps.start:
            return None
        which = f"step {last}" if last == self._steps.start else f"steps {self._steps.start} to {last}"
        kept = f"their trace of before is {self._path_of_all}" if self._path_of_all.exists() else "give later ones"
        return f"warning: --training.profile-steps asks for {which}, and the run is resumed at step {self._step}: not recorded ({kept})"

    def __enter__(self) -> "StepProfiler":
        self._start_if_due()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def step_done(self) -> None:
        """All that is called after a step belongs to the next one."""
        self._step += 1
        if self._profiler is None:
            self._start_if_due()
        elif self._step >= self._steps.stop - 1:
            self._stop()
        else:
            self._profiler.step()

    def _start_if_due(self) -> None:
        """Start one step early where there is one: the profiler's first step is slow."""
        warmup = max(self._steps.start - 1 - self._step, 0)
        active = self._steps.stop - 1 - max(self._step, self._steps.start - 1)
        if active <= 0 or warmup > 1:
            return
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        # one more than wanted: the trace is written when it is stopped, after the last step
        plan = schedule(wait=0, warmup=warmup, active=active + 1)
        self._profiler = profile(activities=activities, schedule=plan, on_trace_ready=lambda done: done.export_chrome_trace(str(self.path)))
        self._profiler.start()

    def _stop(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None


def _trace_path(directory: Path, first: int, steps: range) -> Path:
    return directory / f"trace_{first}-{steps.stop - 1}.json.gz"
