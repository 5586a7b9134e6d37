"""The log of a resumed run holds every step once, also when the kill cut a line short."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from gbla_rec.checkpoint.run_directory import METRICS
from gbla_rec.training.progress import RunLog
from gbla_rec.training.step_window import Rates
from gbla_rec.training.trainer import unread_context


def test_a_resumed_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step, "kind": "train", "loss": float(step)}) for step in (1, 2, 3, 4)]
    (tmp_path / METRICS).write_text("\n".join([*lines, '{"step": 5, "ki']))
    with RunLog(tmp_path, num_steps=6, first_step=2, enabled=True) as log:
        rates = Rates(loss=0.5, step_seconds=1.0, tokens_per_second=1.0, data_wait=0.25, mfu=None)
        log.training(3, rates, learning_rate=1.0, gradient_norm=1.0, tokens=1)
    logged = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in logged] == [(1, 1.0), (2, 2.0), (3, 0.5)]
    # a device whose peak is not known has no MFU
    assert "mfu" not in logged[-1] and logged[-1]["data_wait"] == 0.25


def test_context_columns_that_the_model_leaves_unread_are_known() -> None:
    columns = [SimpleNamespace(name=name) for name in ("kind", "price")]
    config = SimpleNamespace(model=SimpleNamespace(embedding=SimpleNamespace(context_features=("kind",))))
    parts = SimpleNamespace(dataset=SimpleNamespace(manifest=SimpleNamespace(context=columns)), config=config)
    assert unread_context(parts) == ["price"]  # type: ignore[arg-type]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with RunLog(tmp_path, num_steps=6, first_step=0, enabled=False) as log:
        log.validation(1, nll=1.0, num_targets=1)
    assert not list(tmp_path.iterdir())


def test_a_line_of_a_log_file_stays_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLog(tmp_path, num_steps=1_000_000, first_step=0, enabled=True) as log:
        log.message(f"run /data/[shared]/{'x' * 80} begins")
        rates = Rates(loss=12.345, step_seconds=12.345, tokens_per_second=1e9, data_wait=0.25, mfu=0.5)
        log.training(100_000, rates, learning_rate=1.0, gradient_norm=1.0, tokens=1)
        log.validation(100_000, nll=12.345, num_targets=10**15)
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == f"run /data/[shared]/{'x' * 80} begins"
    assert second.startswith("step 100000/1000000  loss 12.345") and second.endswith("s left")
    assert third.endswith("nats per target (1,000,000,000,000,000 targets)")
