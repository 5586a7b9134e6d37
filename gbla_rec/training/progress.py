"""What a person and a dashboard see of a run: a live line, TensorBoard scalars, a JSON-lines log."""

import json
import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard.writer import SummaryWriter

from gbla_rec.checkpoint.run_directory import METRICS, write_text
from gbla_rec.training.metrics_endpoint import MetricsEndpoint
from gbla_rec.training.step_window import Rates


class RunLog:
    """Progress of a run, on rank 0; other ranks make it with ``enabled=False`` and it does nothing."""

    def __init__(self, run_dir: Path, *, num_steps: int, first_step: int, enabled: bool) -> None:
        self.enabled = enabled
        if enabled:
            self._open(run_dir, num_steps, first_step)
        # last: nothing that fails may leave its port bound
        self._endpoint = MetricsEndpoint.from_environment(run_dir, num_steps)

    def _open(self, run_dir: Path, num_steps: int, first_step: int) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._is_live = console.is_terminal
        self._console = console
        self._bar = Progress(*columns, console=console, disable=not self._is_live)
        self._task = self._bar.add_task("train", total=num_steps, completed=first_step, status="")
        self._run_dir, self._num_steps, self._first_step = run_dir, num_steps, first_step
        self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)
        _forget_after(run_dir / METRICS, first_step)
        self._lines = (run_dir / METRICS).open("a", buffering=1)
        self._started = time.monotonic()

    def __enter__(self) -> "RunLog":
        if self.enabled:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._endpoint is not None:
            self._endpoint.close()
        if not self.enabled:
            return
        self._bar.stop()
        # on a full disk closing fails too, and would hide the error
        with suppress(OSError) if error is not None else nullcontext():
            self._board.close()
        with suppress(OSError) if error is not None else nullcontext():
            self._lines.close()

    def training(self, step: int, rates: Rates, *, learning_rate: float, gradient_norm: float, tokens: int) -> None:
        """Report training up to ``step`` (steps done) since the last report, ``tokens`` history events ago."""
        known = {name: value for name, value in asdict(rates).items() if value is not None}
        self._write(step, "train", **known, learning_rate=learning_rate, gradient_norm=gradient_norm, tokens=tokens)
        if self.enabled:
            status = f"loss {rates.loss:.3f}  {rates.tokens_per_second:,.0f} tokens/s  {1000 * rates.step_seconds:,.0f} ms/step"
            if rates.mfu is not None:
                status += f"  MFU {rates.mfu:.1%}"
            status += f"  data wait {rates.data_wait:.1%}"
            self._bar.update(self._task, completed=step, status=status)
            if not self._is_live:
                self.message(f"step {step}/{self._num_steps}  {status}  {self._eta(step)}")

    def validation(self, step: int, *, nll: float, num_targets: int) -> None:
        """Report the validation NLL in nats per target."""
        self._write(step, "validation", nll=nll, num_targets=num_targets)
        if self.enabled:
            self.message(f"step {step}/{self._num_steps}  validation NLL {nll:.4f} nats per target ({num_targets:,} targets)")

    def message(self, text: str) -> None:
        """Print ``text`` above the progress bar, with the line breaks that it has."""
        if self.enabled:
            # soft_wrap: in a file or under a launcher rich would break lines at 80 columns
            self._console.print(text, markup=False, soft_wrap=True)

    def _write(self, step: int, kind: str, **values: float) -> None:
        if self._endpoint is not None:
            self._endpoint.report(step, kind, values)
        if not self.enabled:
            return
        try:
            self._lines.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise OSError(f"step {step} could not be logged to {self._run_dir}: {error}; make room, then train with --resume") from error

    def _eta(self, step: int) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / max(step - self._first_step, 1) * (self._num_steps - step)
        return f"{left:.0f} s left"


def _forget_after(path: Path, step: int) -> None:
    """Drop what a killed run logged after its last checkpoint: the resumed run logs those steps again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:
            # the line that the kill cut short
            continue
    write_text(path, "".join(kept))
