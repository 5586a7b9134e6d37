"""One training step, whole: tokens/s, MFU, kernel time by part, time outside kernels, memory; hybrid against pure softmax attention.

``python benchmarks/training_step.py`` on one GPU, ``torchrun --nproc-per-node 8 benchmarks/training_step.py`` on several (the
budget is per GPU: weak scaling), ``python benchmarks/training_step.py --smoke`` anywhere. Needs neither a dataset nor polars.
``--history-lengths zipf`` trains on histories of many lengths, which ranks share by ``--balance``, and reports waiting.
"""

import argparse
import gc
import itertools
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from collective_time import collectives, transfer_and_waiting
from report import write_report
from step_sizes import Sizes, Workload, parse, sizes_of, workloads_of
from synthetic_histories import synthetic_histories
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from trace_parts import busy_seconds, kernel_seconds, read_trace
from zipf_histories import zipf_batches

from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.sharding import describe_plan, sharded_retriever, unwrap
from gbla_rec.config import (
    DecoderConfig,
    EmbeddingConfig,
    EncoderConfig,
    ModelConfig,
    OptimizerConfig,
    StreamConfig,
    with_sample_costs,
)
from gbla_rec.data.batch import Batch, Collator
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.models.autocast import autocast
from gbla_rec.models.cudnn_attention import num_compiled_plans
from gbla_rec.training.dense_optimizer import DenseOptimizer
from gbla_rec.training.garbage_collection import ScheduledCollection
from gbla_rec.training.model_flops import batch_sizes, peak_flops, training_flops
from gbla_rec.training.prefetch import Prefetcher
from gbla_rec.training.step_guard import StepGuard
from gbla_rec.training.step_pipeline import train_steps

Rows = list[dict[str, Any]]

TARGETS_PER_HISTORY = 32
RESERVE = 0.3
"""Of a GPU, beside the tables. With the default the planner keeps one of two tables of 50 M x 128 off a GPU of 80 GB: a slow step."""


def main() -> None:
    arguments = parse(__doc__)
    sizes = sizes_of(arguments)
    with process_group() as device:
        workloads = workloads_of(arguments, sizes, dist.get_world_size())
        for rows, parts, ranks, plan in measure_all(sizes, workloads, compiled_choices(arguments.compile), device):
            # after each row: a long run that is stopped keeps what it has
            if dist.get_rank() == 0:
                write_step_report(arguments, sizes, rows, parts, ranks, plan)


def write_step_report(arguments: argparse.Namespace, sizes: Sizes, rows: Rows, parts: Rows, ranks: Rows, plan: str) -> None:
    """The report so far."""
    tables = {"Kernel time by part (ms per step, rank 0)": parts, "Time of a step, one pattern against the other": ratios(rows)}
    is_zipf = arguments.history_lengths == "zipf"
    if dist.get_world_size() > 1 or is_zipf:
        tables["Ranks"] = ranks
    tables = {title: table for title, table in tables.items() if table}
    name = f"weak_scaling_{dist.get_world_size()}" if is_zipf else "training_step"
    command = f"{launcher(dist.get_world_size())} {shlex.join(sys.argv)}"
    print(write_report(name, rows, command, notes(sizes, plan, is_zipf), tables=tables, directory=arguments.directory), flush=True)


def launcher(world_size: int) -> str:
    """What started this program."""
    if world_size == 1:
        return "python"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    nodes = f"--nnodes {world_size // per_node} " if per_node < world_size else ""
    return f"torchrun {nodes}--nproc-per-node {per_node}"


def compiled_choices(choice: str) -> list[bool]:
    return {"off": [False], "on": [True], "both": [False, True]}[choice]


def notes(sizes: Sizes, plan: str, is_zipf: bool) -> str:
    histories = (
        "Histories of one length"
        if not is_zipf
        else "Histories of Zipf lengths (benchmarks/zipf_histories.py), dealt to the ranks by cost, by tokens or in turn"
    )
    num_warm = sizes.zipf_warm_steps if is_zipf else sizes.warm_steps
    return (
        f"Two tables of {sizes.rows_per_table:,} x {sizes.table_dim}, in device memory, fused row-wise Adagrad, index de-duplication; "
        f"D={sizes.model_dim}, H={sizes.num_heads}, pattern x {sizes.num_repeats}, SwiGLU {sizes.ffn_dim}, {len(sizes.widths)} code "
        f"levels, {TARGETS_PER_HISTORY} targets per history, kernels={sizes.kernels}, bf16 autocast on CUDA, no activation "
        f"checkpointing. {histories}, random items, through prefetching, collate, TrainPipelineSparseDist and AdamW; {num_warm} warm "
        f"steps, then the mean of {sizes.steps}. First step: of the row, on rank 0, with the compilation that no earlier row has "
        f"done. Parts and time outside kernels: {sizes.profiled_steps} more steps under torch.profiler; "
        "outside = 1 - time with a kernel or copy running / step time without the profiler, negative where the profiled steps had more to "
        "do or to wait for. MFU counts products only "
        "(gbla_rec/config/multiply_adds.py), mean of the GPUs. Ranks: shares of the profiled steps, as long as they took; kernels may "
        "run beside each other. compute: any kernel that is not NCCL's; all-to-all and all-reduce: the shortest time of "
        "each collective over the ranks; waiting: what it took longer on this rank (benchmarks/collective_time.py); "
        "plans compiled: by cuDNN for softmax attention in the timed steps, about 0.1 s each, for which all ranks wait; "
        f"no waiting is shown, and the others hold it, if the ranks' kernels could not be paired.\n\n```\n{plan}\n```"
    )


def measure_all(
    sizes: Sizes, workloads: list[Workload], compiled: list[bool], device: torch.device
) -> Iterator[tuple[Rows, Rows, Rows, str]]:
    """Rows of the main table, of the parts and of the ranks, and the sharding plan: all so far, after each row of the main table."""
    rows: Rows = []
    parts: Rows = []
    ranks: Rows = []
    for pattern in sizes.patterns:
        step = TrainingStep(sizes, pattern, device)
        plan = describe_plan(step.model)
        for is_compiled in compiled:
            for workload in workloads:
                name = {"pattern": pattern, **workload.columns, "compiled": is_compiled}
                measured = step.measure_if_it_fits(workload, is_compiled)
                rows.append({**name, **measured["row"]})
                parts.append({**name, **measured["parts"]})
                ranks += [{**name, **rank} for rank in measured["ranks"]]
                if dist.get_rank() == 0:
                    print(rows[-1], parts[-1], sep="\n", flush=True)
                yield rows, parts, ranks, plan
        del step
        gc.collect()
        torch.cuda.empty_cache()


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """How much longer the last pattern takes than the first."""
    keys = [key for key in ("tokens/GPU", "history", "balance", "compiled") if key in rows[0]]
    patterns = list(dict.fromkeys(row["pattern"] for row in rows))
    times = {(row["pattern"], *(row[key] for key in keys)): row["ms/step"] for row in rows}
    cases = list(dict.fromkeys(tuple(row[key] for key in keys) for row in rows))
    return [
        {**dict(zip(keys, case, strict=True)), f"{other} / {patterns[0]}": times[other, *case] / times[patterns[0], *case]}
        for case in cases
        for other in patterns[1:]
        # not measured, or not yet
        if times.get((other, *case)) is not None and times.get((patterns[0], *case)) is not None
    ]


class TrainingStep:
    """A sharded model with its optimisers, trained on synthetic histories as ``Trainer`` does it."""

    def __init__(self, sizes: Sizes, pattern: str, device: torch.device) -> None:
        self.sizes, self.device = sizes, device
        self.config = ModelConfig(
            embedding=EmbeddingConfig(rows_per_table=sizes.rows_per_table, dim=sizes.table_dim, placement="hbm", memory_reserve=RESERVE),
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
        self.model = sharded_retriever(self.config, optimizer, {}, codes, sizes.widths, lookups_per_batch=tokens, seed=0, device=device)
        self.history = unwrap(self.model).history
        dense = [(name, parameter) for name, parameter in unwrap(self.model).named_parameters() if name.startswith("history.")]
        self.optimizer = DenseOptimizer(dense, optimizer, num_steps=1_000_000)
        self.guard = StepGuard(unwrap(self.model).table_boundary, [parameter for _, parameter in dense], device)
        self.optimizer.skip_when(self.guard.is_bad)
        self.collator = Collator(
            self.config.embedding, np.arange(sizes.num_items), num_code_levels=len(sizes.widths), world_size=dist.get_world_size()
        )
        self.model.train()

    def measure_if_it_fits(self, workload: Workload, is_compiled: bool) -> dict[str, Any]:
        """As ``measure``; on one GPU that is too small, a row that says so. Several ranks would wait for the one that failed."""
        try:
            return self.measure(workload, is_compiled)
        except torch.OutOfMemoryError as error:
            if dist.get_world_size() > 1:
                raise
            return {"row": {"ms/step": None, "error": f"OutOfMemoryError: {str(error).splitlines()[0]}"}, "parts": {}, "ranks": []}

    def measure(self, workload: Workload, is_compiled: bool) -> dict[str, Any]:
        """One row for the main table, one for the parts, one for each rank."""
        if is_compiled:
            self.history.compile_training()
        else:
            self.history.stop_compiling()
        self._reset_peak()
        num_warm = self.sizes.warm_steps if workload.balance is None else self.sizes.zipf_warm_steps
        total = num_warm + self.sizes.steps + self.sizes.profiled_steps
        batches = Prefetcher(lambda: self._batches(workload), 4, start=self._choose_device)
        with batches, ScheduledCollection():
            trained = train_steps(self.model, self.optimizer, self.device, self._forward, itertools.islice(batches, total), 1)
            started = time.perf_counter()
            next(trained)
            self._synchronize()
            first_seconds = time.perf_counter() - started
            for _ in range(num_warm - 1):
                next(trained)
            self._synchronize()
            waited, num_plans, started = batches.seconds_waited, num_compiled_plans(), time.perf_counter()
            timed = [next(trained)[0][0] for _ in range(self.sizes.steps)]
            self._synchronize()
            seconds = (time.perf_counter() - started) / self.sizes.steps
            waited = (batches.seconds_waited - waited) / self.sizes.steps
            num_plans = num_compiled_plans() - num_plans
            events, profiled_seconds = self._profile(trained)
            assert not list(trained)
        row = self._row(timed, seconds, waited, busy_seconds(events) / self.sizes.profiled_steps)
        row["first step (s)"] = first_seconds
        parts = {part: 1000 * spent / self.sizes.profiled_steps for part, spent in sorted(kernel_seconds(events).items())}
        ranks = self._ranks(timed, seconds, events, profiled_seconds, num_plans)
        return {"row": row, "parts": parts, "ranks": ranks}

    def _profile(self, trained: Iterator[Any]) -> tuple[list[dict[str, Any]], float]:
        """The events of the profiled steps, and the seconds that they took."""
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device.type == "cuda" else [])]
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            for _ in range(self.sizes.profiled_steps):
                next(trained)
            self._synchronize()
            seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "trace.json")
            profiler.export_chrome_trace(str(path))
            return read_trace(path), seconds

    def _row(self, timed: list[Batch], seconds: float, waited: float, busy: float) -> dict[str, Any]:
        """Of the whole job; ``seconds``, ``waited`` and ``busy`` of a step."""
        peak, is_cuda = peak_flops(self.device), self.device.type == "cuda"
        flops = torch.tensor(self._flops(timed), dtype=torch.float64, device=self.device)
        dist.all_reduce(flops)
        flops_per_gpu = float(flops) / len(timed) / dist.get_world_size()
        return {
            "ms/step": 1000 * seconds,
            "tokens/s": round(sum(batch.num_global_tokens for batch in timed) / len(timed) / seconds),
            "MFU (%)": None if peak is None else 100 * flops_per_gpu / (seconds * peak),
            "outside kernels (%)": 100 * (1 - busy / seconds) if is_cuda else None,
            "data wait (%)": 100 * waited / seconds,
            "peak memory (GiB)": torch.cuda.max_memory_allocated() / 2**30 if is_cuda else None,
        }

    def _ranks(
        self, timed: list[Batch], seconds: float, events: list[dict[str, Any]], profiled_seconds: float, num_plans: int
    ) -> list[dict[str, Any]]:
        """One row a rank: its work, and where its time goes."""
        compute = busy_seconds(event for event in events if "nccl" not in event["name"].lower())
        own = {
            "rank": dist.get_rank(),
            "ms/step": 1000 * seconds,
            "tokens/step": round(sum(batch.items.numel() for batch in timed) / len(timed)),
            "TFLOP/step": self._flops(timed) / len(timed) / 1e12,
            "plans compiled": num_plans,
            "compute (% of step)": 100 * compute / profiled_seconds,
        }
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (own, collectives(events), profiled_seconds))
        divided = transfer_and_waiting([rank for _, rank, _ in gathered])
        return [
            {**row, **{f"{kind} (% of step)": None if spent is None else 100 * spent / took for kind, spent in shares.items()}}
            for (row, _, took), shares in zip(gathered, divided, strict=True)
        ]

    def _flops(self, batches: Iterable[Batch]) -> int:
        sizes = [batch_sizes(batch.layout, batch.code_layout, batch.targets.numel(), self.config.encoder.window) for batch in batches]
        return sum(training_flops(self.config, self.sizes.widths, of_batch) for of_batch in sizes)

    def _histories(self, workload: Workload) -> Iterator[HistoryBatch]:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        history, budget, num_items = workload.history, workload.budget, self.sizes.num_items
        if workload.balance is None:
            return synthetic_histories(history, budget, TARGETS_PER_HISTORY, num_items, rank=rank, world_size=world_size)
        stream = StreamConfig(tokens_per_batch=budget * world_size, max_history_length=history, targets_per_cut=TARGETS_PER_HISTORY)
        costs = with_sample_costs(stream, self.config, self.sizes.widths)
        return zipf_batches(history, budget, TARGETS_PER_HISTORY, num_items, costs, workload.balance, rank=rank, world_size=world_size)

    def _batches(self, workload: Workload) -> Iterator[list[Batch]]:
        for one in self._histories(workload):
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
