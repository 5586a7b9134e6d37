"""One training step, whole: tokens/s, MFU, kernel time by part, time outside kernels, memory; hybrid against pure softmax attention.

``python benchmarks/training_step.py`` on one GPU, ``torchrun --nproc-per-node 8 benchmarks/training_step.py`` on several (the
budget is per GPU: weak scaling), ``python benchmarks/training_step.py --smoke`` anywhere. Needs neither a dataset nor polars.
"""

import argparse
import gc
import itertools
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from report import RESULTS, write_report
from synthetic_histories import synthetic_histories
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trace_parts import busy_seconds, communication_seconds, kernel_seconds, read_trace

from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.sharding import describe_plan, sharded_retriever, unwrap
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig, OptimizerConfig
from gbla_rec.data.batch import Batch, Collator
from gbla_rec.models.autocast import autocast
from gbla_rec.training.dense_optimizer import DenseOptimizer
from gbla_rec.training.model_flops import batch_sizes, peak_flops, training_flops
from gbla_rec.training.prefetch import Prefetcher
from gbla_rec.training.step_guard import StepGuard
from gbla_rec.training.step_pipeline import train_steps

WARM_STEPS, PROFILED_STEPS = 4, 3
TARGETS_PER_HISTORY = 32


@dataclass(frozen=True)
class Sizes:
    """What is measured; ``smoke`` sizes take seconds on a CPU."""

    rows_per_table: int
    table_dim: int
    num_items: int
    widths: tuple[int, ...]
    model_dim: int
    num_heads: int
    ffn_dim: int
    num_repeats: int
    patterns: tuple[str, ...]
    budgets: tuple[int, ...]
    histories: tuple[int, ...]
    steps: int
    kernels: str


FULL = Sizes(
    rows_per_table=50_000_000,
    table_dim=128,
    num_items=1_000_000,
    widths=(1024, 1024, 1024, 256),
    model_dim=512,
    num_heads=8,
    ffn_dim=1408,
    num_repeats=2,
    patterns=("SGG", "SSS"),
    budgets=(65_536, 262_144),
    histories=(2048, 8192, 32_768),
    steps=10,
    kernels="triton",
)
SMOKE = Sizes(
    rows_per_table=256,
    table_dim=8,
    num_items=100,
    widths=(8, 8),
    model_dim=16,
    num_heads=2,
    ffn_dim=16,
    num_repeats=1,
    patterns=("SG", "SS"),
    budgets=(256,),
    histories=(64, 128),
    steps=2,
    kernels="reference",
)


def main() -> None:
    arguments = parse()
    sizes = sizes_of(arguments)
    with process_group() as device:
        rows, parts, ranks, plan = measure_all(sizes, compiled_choices(arguments.compile), device)
        if dist.get_rank() == 0:
            tables = {"Kernel time by part (ms per step, rank 0)": parts, "Time of a step, one pattern against the other": ratios(rows)}
            if dist.get_world_size() > 1:
                tables["Ranks"] = ranks
            command = " ".join(["python" if dist.get_world_size() == 1 else "torchrun ...", shlex.join(sys.argv)])
            print(write_report("training_step", rows, command, notes(sizes, plan), tables=tables, directory=arguments.directory))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rows-per-table", type=int)
    parser.add_argument("--patterns", nargs="+")
    parser.add_argument("--budgets", type=int, nargs="+", help="history tokens of a step on each GPU")
    parser.add_argument("--histories", type=int, nargs="+", help="events of each history")
    parser.add_argument("--steps", type=int, help="steps that are timed, after the warm ones")
    parser.add_argument("--kernels", choices=["triton", "reference"])
    parser.add_argument("--compile", choices=["off", "on", "both"], default="both")
    parser.add_argument("--directory", type=Path, default=RESULTS)
    return parser.parse_args()


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    given = {name: getattr(arguments, name) for name in ("rows_per_table", "patterns", "budgets", "histories", "steps", "kernels")}
    start = SMOKE if arguments.smoke else FULL
    return Sizes(**{**start.__dict__, **{name: value for name, value in given.items() if value is not None}})


def compiled_choices(choice: str) -> list[bool]:
    return {"off": [False], "on": [True], "both": [False, True]}[choice]


def notes(sizes: Sizes, plan: str) -> str:
    return (
        f"Two tables of {sizes.rows_per_table:,} x {sizes.table_dim}, fused row-wise Adagrad, index de-duplication; D={sizes.model_dim}, "
        f"H={sizes.num_heads}, pattern x {sizes.num_repeats}, SwiGLU {sizes.ffn_dim}, {len(sizes.widths)} code levels, "
        f"{TARGETS_PER_HISTORY} targets per history, kernels={sizes.kernels}, bf16 autocast on CUDA, no activation checkpointing. "
        f"Histories of one length, random items, through prefetching, collate, TrainPipelineSparseDist and AdamW; {WARM_STEPS} warm "
        f"steps, then the mean of {sizes.steps}. Parts and time outside kernels: {PROFILED_STEPS} more steps under torch.profiler; "
        "outside = 1 - time with a kernel or copy running / step time without the profiler. MFU counts products only "
        f"(gbla_rec/config/multiply_adds.py).\n\n```\n{plan}\n```"
    )


def measure_all(sizes: Sizes, compiled: list[bool], device: torch.device) -> tuple[list[dict[str, Any]], ...]:
    """Rows of the main table, of the parts and of the ranks, and the sharding plan."""
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    ranks: list[dict[str, Any]] = []
    plan: Any = ""
    for pattern in sizes.patterns:
        step = TrainingStep(sizes, pattern, device)
        plan = describe_plan(step.model)
        for is_compiled in compiled:
            for budget, history in itertools.product(sizes.budgets, sizes.histories):
                name = {"pattern": pattern, "tokens/GPU": budget, "history": history, "compiled": is_compiled}
                measured = step.measure_if_it_fits(budget, history, is_compiled)
                rows.append({**name, **measured["row"]})
                parts.append({**name, **measured["parts"]})
                ranks += [{**name, **rank} for rank in measured["ranks"]]
                if dist.get_rank() == 0:
                    print(rows[-1], parts[-1], sep="\n", flush=True)
        del step
        gc.collect()
        torch.cuda.empty_cache()
    return rows, parts, ranks, plan


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much longer the last pattern takes than the first."""
    keys = ("tokens/GPU", "history", "compiled")
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    times = {(row["pattern"], *(row[key] for key in keys)): row["ms/step"] for row in rows}
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    return [
        {**dict(zip(keys, case, strict=True)), f"{other} / {patterns[0]}": times[other, *case] / times[patterns[0], *case]}
        for case in cases
        for other in patterns[1:]
        if times[other, *case] is not None and times[patterns[0], *case] is not None
    ]


class TrainingStep:
    """A sharded model with its optimisers, trained on synthetic histories as ``Trainer`` does it."""

    def __init__(self, sizes: Sizes, pattern: str, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.config = ModelConfig(
            embedding=EmbeddingConfig(rows_per_table=sizes.rows_per_table, dim=sizes.table_dim),
            encoder=EncoderConfig(
                model_dim=sizes.model_dim, num_heads=sizes.num_heads, pattern=pattern, num_repeats=sizes.num_repeats, ffn_dim=sizes.ffn_dim
            ),
            decoder=DecoderConfig(num_heads=sizes.num_heads),
            kernels=sizes.kernels,  # type: ignore[arg-type]
        )
        generator = torch.Generator().manual_seed(0)
        codes = torch.stack([torch.randint(0, width, (sizes.num_items,), generator=generator) for width in sizes.widths], dim=1)
        optimizer = OptimizerConfig()
        tokens = max(sizes.budgets) * dist.get_world_size()
        self.model = sharded_retriever(self.config, optimizer, {}, codes, sizes.widths, tokens_per_batch=tokens, seed=0, device=device)
        self.history = unwrap(self.model).history
        dense = [(name, parameter) for name, parameter in unwrap(self.model).named_parameters() if name.startswith("history.")]
        self.optimizer = DenseOptimizer(dense, optimizer, num_steps=1_000_000)
        self.guard = StepGuard(unwrap(self.model).table_boundary, [parameter for _, parameter in dense], device)
        self.optimizer.skip_when(self.guard.is_bad)
        self.collator = Collator(
            self.config.embedding, np.arange(sizes.num_items), num_code_levels=len(sizes.widths), world_size=dist.get_world_size()
        )
        self.model.train()

    def measure_if_it_fits(self, budget: int, history: int, is_compiled: bool) -> dict[str, Any]:
        """As ``measure``; on one GPU that is too small, a row that says so. Several ranks would wait for the one that failed."""
        try:
            return self.measure(budget, history, is_compiled)
        except torch.OutOfMemoryError as error:
            if dist.get_world_size() > 1:
                raise
            return {"row": {"ms/step": None, "error": f"OutOfMemoryError: {str(error).splitlines()[0]}"}, "parts": {}, "ranks": []}

    def measure(self, budget: int, history: int, is_compiled: bool) -> dict[str, Any]:
        """One row for the main table, one for the parts, one for each rank."""
        if is_compiled:
            self.history.compile_training()
        else:
            self.history.stop_compiling()
        self._reset_peak()
        total = WARM_STEPS + self.sizes.steps + PROFILED_STEPS
        batches = Prefetcher(lambda: self._batches(budget, history), 4, start=self._choose_device)
        with batches:
            trained = train_steps(self.model, self.optimizer, self.device, self._forward, itertools.islice(batches, total), 1)
            first = [next(trained) for _ in range(WARM_STEPS)][-1][0][0]
            self._synchronize()
            waited, started = batches.seconds_waited, time.perf_counter()
            for _ in range(self.sizes.steps):
                next(trained)
            self._synchronize()
            seconds = (time.perf_counter() - started) / self.sizes.steps
            waited = (batches.seconds_waited - waited) / self.sizes.steps
            events = self._profile(trained)
            assert not list(trained)
        return self._rows(first, seconds, waited, events)

    def _profile(self, trained: Iterator[Any]) -> list[dict[str, Any]]:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            for _ in range(PROFILED_STEPS):
                next(trained)
            self._synchronize()
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(path))
            return read_trace(path)

    def _rows(self, batch: Batch, seconds: float, waited: float, events: list[dict[str, Any]]) -> dict[str, Any]:
        sizes = batch_sizes(batch.layout, batch.code_layout, batch.targets.numel(), self.config.encoder.window)
        flops, peak = training_flops(self.config, self.sizes.widths, sizes), peak_flops(self.device)
        is_cuda = self.device.type == "cuda"
        busy = busy_seconds(events) / PROFILED_STEPS
        row = {
            "ms/step": 1000 * seconds,
            "tokens/s": round(batch.num_global_tokens / seconds),
            "MFU (%)": None if peak is None else 100 * flops / (seconds * peak),
            "outside kernels (%)": 100 * (1 - busy / seconds) if is_cuda else None,
            "data wait (%)": 100 * waited / seconds,
            "peak memory (GiB)": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        }
        parts = {part: 1000 * spent / PROFILED_STEPS for part, spent in sorted(kernel_seconds(events).items())}
        shares = {name: 100 * spent / PROFILED_STEPS / seconds for name, spent in communication_seconds(events).items()}
        own = {"rank": dist.get_rank(), "ms/step": 1000 * seconds, **{f"{name} (% of step)": share for name, share in shares.items()}}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        return {"row": row, "parts": parts, "ranks": ranks}

    def _batches(self, budget: int, history: int) -> Iterator[list[Batch]]:
        histories = synthetic_histories(
            history, budget, TARGETS_PER_HISTORY, self.sizes.num_items, rank=dist.get_rank(), world_size=dist.get_world_size()
        )
        for one in histories:
            batch = self.collator(one)
            yield [batch.pin_memory() if self.device.type == "cuda" else batch]

    def _forward(self, batch: Batch | None) -> tuple[Tensor, Tensor]:
        with autocast(self.device):
            loss, nll = self.model(batch)
        return self.guard.protect(loss), nll

    def _choose_device(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
