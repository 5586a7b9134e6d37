"""What the step benchmark measures: sizes of the model, histories of a step, and the options that change them."""

import argparse
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from report import results_directory
from zipf_histories import Balance

ZIPF_STEPS, ZIPF_PROFILED_STEPS = 48, 12
"""More steps where batches differ."""


@dataclass(frozen=True)
class Workload:
    """What a step trains on: ``budget`` tokens a GPU in histories of ``history`` events, or of Zipf lengths up to that."""

    budget: int
    history: int
    balance: Balance | None = None
    """How ranks share histories of Zipf lengths; None: all have one length."""

    @property
    def columns(self) -> dict[str, Any]:
        if self.balance is None:
            return {"tokens/GPU": self.budget, "history": self.history}
        return {"tokens/GPU": self.budget, "history": f"Zipf to {self.history}", "balance": self.balance}


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
    warm_steps: int
    zipf_warm_steps: int
    """By then a rank has met nearly all sizes that cuDNN compiles a plan for."""
    steps: int
    profiled_steps: int
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
    warm_steps=4,
    zipf_warm_steps=480,
    steps=10,
    profiled_steps=3,
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
    warm_steps=1,
    zipf_warm_steps=2,
    steps=2,
    profiled_steps=1,
    kernels="reference",
)


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--rows-per-table", type=int)
    parser.add_argument("--patterns", nargs="+")
    parser.add_argument("--budgets", type=int, nargs="+", help="history tokens of a step on each GPU")
    parser.add_argument("--histories", type=int, nargs="+", help="events of each history")
    parser.add_argument("--history-lengths", choices=["one", "zipf"], default="one", help="all equally long, or Zipf up to the longest")
    parser.add_argument("--balance", choices=["cost", "tokens", "none"], nargs="+", default=["cost", "tokens", "none"])
    parser.add_argument("--steps", type=int, help="steps that are timed, after the warm ones")
    parser.add_argument("--kernels", choices=["triton", "reference"])
    parser.add_argument("--compile", choices=["off", "on", "both"], default="both")
    parser.add_argument("--directory", type=Path, help="of the report (default: benchmarks/results; with --smoke in the workspace)")
    arguments = parser.parse_args()
    if not arguments.smoke and not torch.cuda.is_available():
        print(f"{Path(sys.argv[0]).name}: skipped, it needs a CUDA GPU; --smoke runs tiny sizes anywhere")
        sys.exit(0)
    arguments.directory = results_directory(arguments.directory, is_whole=not arguments.smoke)
    return arguments


def sizes_of(arguments: argparse.Namespace) -> Sizes:
    given = {name: getattr(arguments, name) for name in ("rows_per_table", "patterns", "budgets", "histories", "steps", "kernels")}
    start = SMOKE if arguments.smoke else FULL
    if arguments.history_lengths == "zipf" and not arguments.smoke:
        given |= {"steps": given["steps"] or ZIPF_STEPS, "profiled_steps": ZIPF_PROFILED_STEPS}
    return Sizes(**{**start.__dict__, **{name: value for name, value in given.items() if value is not None}})


def workloads_of(arguments: argparse.Namespace, sizes: Sizes, world_size: int) -> list[Workload]:
    if arguments.history_lengths == "one":
        return [Workload(budget, history) for budget, history in itertools.product(sizes.budgets, sizes.histories)]
    # one rank has nothing to share
    balances = arguments.balance if world_size > 1 else arguments.balance[:1]
    return [Workload(budget, max(sizes.histories), balance) for budget, balance in itertools.product(sizes.budgets, balances)]
