"""Several GPUs: a dataset with long histories, and launches of torchrun that the tests of this directory share.

Starting processes is most of the time, so each launch does many jobs, and launches that need nothing of each other run at once.
``GBLA_REC_TEST_CPU_RANKS=4`` plays up to 4 GPUs with gloo ranks on a machine without any: smaller sizes, reference kernels.
"""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from gbla_rec import config as c
from gbla_rec.data.prepare import prepare
from gbla_rec.semantic_ids.tokenize import tokenize

ROOT = Path(__file__).resolve().parents[2]
CPU_RANKS = "GBLA_REC_TEST_CPU_RANKS"
SEMANTIC_IDS = c.SemanticIdConfig(embedding_dim=8, min_codebook_width=8, dedup_width=64, kmeans_iterations=5)
STOP_AT, SIGNAL_AT = 4, 6
"""Step after whose checkpoint runs end that go on elsewhere; step in whose middle a rank is killed."""
BACKGROUND_SAVES = ("terminated",)
"""Runs that save while they train on: SIGTERM may come while a checkpoint is written."""
Results = dict[str, dict[str, Any]]


def num_devices() -> int:
    return int(os.environ.get(CPU_RANKS, torch.cuda.device_count()))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if num_devices() < 2:
        skip = pytest.mark.skip(reason="needs two CUDA devices")
        for item in items:
            if item.get_closest_marker("multi_gpu") is not None:
                item.add_marker(skip)


@dataclasses.dataclass(frozen=True)
class Sizes:
    users: int
    long_histories: tuple[int, ...]
    items: int
    model_dim: int
    tokens_per_batch: int
    evaluation_tokens: int
    kernels: Any


ON_CPU = Sizes(30, (300, 450), 80, 16, 900, 300, "reference")
# histories of more than 256 events have several splits in the Triton kernels, those of more than 1,536 coarse ones
ON_GPU = Sizes(1500, (2000, 2300, 3000, 3700, 4500, 5000), 500, 128, 12_000, 2_000, "triton")


def sizes() -> Sizes:
    return ON_CPU if CPU_RANKS in os.environ else ON_GPU


def make_dataset(root: Path) -> None:
    """``root/workspace`` with a prepared and tokenized dataset ``long``: many short histories and a few very long ones."""
    random, size = np.random.default_rng(0), sizes()
    lengths = np.append(random.integers(10, 60, size=size.users), size.long_histories)
    users = np.repeat(np.arange(len(lengths)), lengths)
    # each user walks through the catalogue: the next item is predictable
    items = (np.cumsum(random.choice([1, 1, 1, 2, 5], size=users.size)) + users * 7) % size.items
    kinds = random.choice(["view", "buy"], size=users.size)
    columns = {"user_id": users, "item_id": items, "timestamp": np.arange(users.size), "kind": kinds}
    pl.DataFrame(columns).write_parquet(root / "log.parquet")
    titles = [f"title {item // 10} {item}" for item in range(size.items)]
    pl.DataFrame({"item_id": np.arange(size.items), "title": titles}).write_parquet(root / "items.parquet")
    split = c.SplitConfig(num_targets=2)
    log = c.PrepareConfig(
        name="long",
        events=root / "log.parquet",
        items=root / "items.parquet",
        context_columns=("kind",),
        split=split,
        max_events_per_shard=20_000,
    )
    tokenize(prepare(log, root / "workspace/datasets/long"), SEMANTIC_IDS, root / "workspace/semantic_ids/long")


def run_config(name: str, sharding: Any = "row_wise", *, is_fp32: bool = True) -> c.RunConfig:
    """A run of 16 steps; fp32 with reference kernels, or with the kernels and the precision that a GPU trains in."""
    size = sizes()
    # two column shards of each table need 256 columns
    dim = 256 if sharding == "column_wise" else 16
    embedding = c.EmbeddingConfig(rows_per_table=1024, dim=dim, context_features=("kind",), semantic_code_dim=8, sharding=sharding)
    encoder = c.EncoderConfig(model_dim=size.model_dim, num_heads=2, pattern="SGG", ffn_dim=size.model_dim, dropout=0.1)
    decoder = c.DecoderConfig(num_heads=2, ffn_dim=size.model_dim, dropout=0.1)
    return c.RunConfig(
        name=name,
        dataset="long",
        semantic_ids=SEMANTIC_IDS,
        model=c.ModelConfig(embedding=embedding, encoder=encoder, decoder=decoder, kernels="reference" if is_fp32 else size.kernels),
        stream=c.StreamConfig(tokens_per_batch=size.tokens_per_batch, max_history_length=8192, targets_per_cut=8),
        # a large eps: without it Adagrad hides a gradient of the wrong scale
        optimizer=c.OptimizerConfig(learning_rate=2e-3, warmup_steps=2, table_learning_rate=1.0, table_eps=1.0),
        training=c.TrainingConfig(
            num_steps=16, validate_every=8, save_every=4, log_every=1, validation_users=100, async_save=name in BACKGROUND_SAVES
        ),
        evaluation=c.EvaluationConfig(
            num_beams=20, cutoffs=(5, 20), tokens_per_batch=size.evaluation_tokens, shortlist_users=200, bootstrap_samples=200
        ),
    )


def training(name: str, sharding: str = "row_wise", *, is_fp32: bool = True, **options: Any) -> dict[str, Any]:
    """A job of ``rank_program.py``; the run in the workspace has the job's name, or ``run``."""
    run = options.pop("run", name)
    config = run_config(run.replace(" ", "_"), sharding, is_fp32=is_fp32)
    return {"name": name, "kind": "train", "config": config, "is_fp32": is_fp32, **options}


def curves(num_ranks: int) -> list[dict[str, Any]]:
    """Whole runs of all shardings and precisions."""
    return [
        training(f"{precision} {sharding}", sharding, is_fp32=precision == "fp32", run=f"{precision}_{sharding}_{num_ranks}")
        for precision, sharding in (
            ("fp32", "row_wise"),
            ("fp32", "table_wise"),
            ("fp32", "column_wise"),
            ("bf16", "row_wise"),
            ("bf16", "table_wise"),
        )
    ]


EVALUATED = {"name": "evaluation", "kind": "evaluate", "run": "bf16_row_wise_2"}
COPY = "copy"
"""Name of a copy of that run."""


class Launch:
    """A torchrun that does jobs in the background."""

    def __init__(self, directory: Path, workspace: Path, num_ranks: int, jobs: list[dict[str, Any]], max_restarts: int = 0) -> None:
        directory.mkdir()
        self.directory = directory
        (directory / "jobs").write_bytes(pickle.dumps(jobs))
        options = ["--standalone", "--nproc-per-node", str(num_ranks), "--max-restarts", str(max_restarts), "--monitor-interval", "0.1"]
        program = [str(Path(__file__).with_name("rank_program.py")), str(directory)]
        # torch 2.11 waits 30 s for the ranks that hang with a killed one, later versions as long as they are told
        environment = {
            "GBLA_REC_WORKSPACE": str(workspace),
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "10",
        }
        if CPU_RANKS in os.environ:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        with (directory / "output").open("w") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *options, *program],
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "1", **os.environ, **environment},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        return (self.directory / "output").read_text(errors="replace")

    def wait(self, timeout_s: float = 240.0) -> int:
        """Exit status of torchrun; one that does not end in time is ended, and the test fails with its output."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end()
            pytest.fail(f"torchrun did not end within {timeout_s:g} s\n{self.output[-8000:]}", pytrace=False)

    def results(self) -> Results:
        """What each job gave; the test fails with the output if one failed."""
        status = self.wait()
        if status != 0:
            pytest.fail(f"torchrun ended with status {status}\n{self.output[-8000:]}", pytrace=False)
        return dict(json.loads((self.directory / "results.json").read_text()))

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Launcher:
    """Starts torchrun on one workspace, and ends what still runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.launches = root, list[Launch]()

    @property
    def workspace(self) -> Path:
        return self.root / "workspace"

    def __call__(self, num_ranks: int, jobs: list[dict[str, Any]], max_restarts: int = 0) -> Launch:
        launch = Launch(self.root / f"launch-{len(self.launches)}", self.workspace, num_ranks, jobs, max_restarts)
        self.launches.append(launch)
        return launch


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    root = tmp_path_factory.mktemp("multi_gpu")
    make_dataset(root)
    launcher = Launcher(root)
    yield launcher
    for launch in launcher.launches:
        launch.end()


@pytest.fixture(scope="session")
def first_launches(launcher: Launcher) -> dict[str, Launch]:
    """What needs nothing of other launches, all at once."""
    return {
        "alone": launcher(
            1,
            [
                training("fp32", run="fp32_1"),
                training("bf16", is_fp32=False, run="bf16_1"),
                training("column_wise", "column_wise", run="column_wise_1"),
                training("1 to 2", last_step=STOP_AT),
            ],
        ),
        "killed": launcher(2, [training("killed", resume=True, kill_at=SIGNAL_AT)], max_restarts=1),
        "terminated": launcher(2, [training("terminated", terminate_at=SIGNAL_AT)]),
    }


@pytest.fixture(scope="session")
def alone(first_launches: dict[str, Launch]) -> Results:
    """Undisturbed runs on one rank: what all others are held against."""
    return first_launches["alone"].results()


@pytest.fixture(scope="session")
def on_two(launcher: Launcher, first_launches: dict[str, Launch], alone: Results) -> Results:
    first_launches["terminated"].wait()
    stopped = [training(f"2 to {ranks}", last_step=STOP_AT) for ranks in (1, 4)]
    resumed = [training("1 to 2", resume=True), training("terminated", resume=True)]
    return launcher(2, [*curves(2), *stopped, *resumed, EVALUATED]).results()


@pytest.fixture(scope="session")
def last_launches(launcher: Launcher, on_two: Results) -> dict[int, Launch]:
    """What goes on from two ranks, at once, by number of ranks."""
    on_one = [training("2 to 1", resume=True), EVALUATED | {"run": COPY}]
    # both write into the run that they evaluate
    run = next(iter((launcher.workspace / "runs" / EVALUATED["run"]).iterdir()))
    shutil.copytree(run, launcher.workspace / "runs" / COPY / run.name)
    launches = {1: launcher(1, on_one)}
    if num_devices() >= 4:
        launches[4] = launcher(4, [*curves(4), training("2 to 4", resume=True), EVALUATED])
    return launches


@pytest.fixture(scope="session")
def on_one_after_two(last_launches: dict[int, Launch]) -> Results:
    return last_launches[1].results()


@pytest.fixture(scope="session")
def on_four(last_launches: dict[int, Launch]) -> Results:
    if 4 not in last_launches:
        pytest.skip("needs four CUDA devices")
    return last_launches[4].results()
