"""Settings of every test, and the fixtures that are shared: a private workspace, and functions run on several gloo ranks."""

import os

# Before torch starts its threads: the parallel test processes share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("POLARS_MAX_THREADS", "1")

import torch

# Before the first `import triton` (torchrec imports it): its decorators read the variable once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import contextlib
import dataclasses
import functools
import gc
import itertools
import multiprocessing
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import cloudpickle
import hypothesis
import pytest

hypothesis.settings.register_profile("ci", max_examples=20, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("nightly", max_examples=200, deadline=None, database=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def _speed_up_interpreter() -> None:
    """Leave out what Triton's interpreter does again and again without an effect; it computes what it did.

    These are private names of Triton 3.6 and 3.7: where one is missing, tests take twice as long.
    """
    from triton.runtime import interpreter

    if not all(hasattr(interpreter, name) for name in ("interpreter_builder", "_get_np_dtype", "_patch_lang", "_LangPatchScope")):
        return
    builder, languages = interpreter.interpreter_builder, (interpreter.tl, interpreter.tl.core)
    # a check of every sum and product of integers, whose result is dropped unless in debug
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)

    # a table made anew for each value that is stored; pointers cannot be hashed
    dtype_of, dtype_of_element = interpreter._get_np_dtype, functools.cache(interpreter._get_np_dtype)

    def dtype_from_table(dtype: Any) -> Any:
        element = dtype.element_ty if isinstance(dtype, interpreter.tl.block_type) else dtype
        return dtype_of(dtype) if isinstance(element, interpreter.tl.pointer_type) else dtype_of_element(element)

    interpreter._get_np_dtype = dtype_from_table

    # the language is patched for a launch and restored after it, but patched again for every call of a device function
    patch, patched, nothing = interpreter._patch_lang, set(), interpreter._LangPatchScope()

    @functools.cache
    def seen_by(function: Any) -> tuple[bool, ...]:
        values = {id(value) for value in function.__globals__.values()}
        return tuple(id(language) in values for language in languages)

    def patch_once(function: Any) -> Any:
        if seen_by(function) in patched:
            # a launch, too, comes here after a device function was called outside of one
            return nothing
        scope = patch(function)
        patched.add(seen_by(function))
        restore = scope.restore

        def restore_and_forget() -> None:
            restore()
            patched.clear()

        scope.restore = restore_and_forget
        return scope

    interpreter._patch_lang = patch_once


if os.environ.get("TRITON_INTERPRET") == "1":
    _speed_up_interpreter()

TESTS = str(Path(__file__).parent) + os.sep
COLLECTIVE_TIMEOUT = timedelta(seconds=60)
"""A rank that waits for a dead one gives up after this time."""

PRELOADED = (
    "torchrec",
    "torch.distributed.optim",
    "torch.utils.tensorboard.writer",
    "sklearn.utils.extmath",
    "gbla_rec.models.retriever",
    "gbla_rec.training.progress",
)
"""What a rank has imported when it starts: of what commands need, the slow imports that start no thread (polars and pyarrow do)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty workspace directory that ``gbla_rec.workspace`` points to during this test."""
    path = tmp_path / "workspace"
    monkeypatch.setenv("GBLA_REC_WORKSPACE", str(path))
    return path


class RunRanks(Protocol):
    """``run_ranks(fn, world_size, *args)`` returns ``[fn(rank, world_size, *args) for rank in range(world_size)]``."""

    def __call__(self, fn: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 120.0) -> list[Any]: ...


@pytest.fixture
def run_ranks(tmp_path: Path) -> RunRanks:
    """Runs a function on several ranks of a gloo process group, each in its own process, and returns what each rank returned.

    ``fn`` gets ``(rank, world_size, *args)`` with the default process group ready; it may be any function or closure of a
    test file. What it returns goes through ``torch.save``. Environment variables are those of the caller. If a rank fails,
    the test fails with the traceback and the output of every rank.

    The processes are forked from a server that has made the slow imports and started no thread: forking the test process
    itself would be as quick, but polars, OpenMP and autograd hang or refuse in the child once the parent has used them.
    """
    calls = itertools.count()

    def run(fn: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 120.0) -> list[Any]:
        directory = tmp_path / f"ranks-{next(calls)}"
        directory.mkdir()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        main = _ByValue(functools.partial(_rank_main, fn, world_size, args, directory, dict(os.environ)))
        processes = [context.Process(target=main, args=(rank,), daemon=True) for rank in range(world_size)]
        try:
            for process in processes:
                process.start()
            finished = _wait(processes, timeout_s)
        finally:
            for process in processes:
                if process.pid is None:
                    continue
                process.kill()
                process.join()
        if not finished or any(process.exitcode != 0 for process in processes):
            pytest.fail(_report(processes, directory, None if finished else timeout_s), pytrace=False)
        return [torch.load(directory / f"{rank}.result", weights_only=False) for rank in range(world_size)]

    return run


class LaunchRanks(Protocol):
    """``launch_ranks(program, world_size, *args)`` returns ``[(exit status, output)]`` of the ranks."""

    def __call__(self, program: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 60.0) -> list[tuple[int, str]]: ...


@pytest.fixture
def launch_ranks(tmp_path: Path) -> LaunchRanks:
    """Runs ``program(rank, *args)`` as a launcher runs the ranks of a command: it joins the group itself, and may end in any way.

    Each rank has its own process with torchrun's variables; a rank that did not end in time has the exit status -9.
    """
    calls = itertools.count()

    def launch(program: Callable[..., Any], world_size: int, /, *args: Any, timeout_s: float = 60.0) -> list[tuple[int, str]]:
        directory = tmp_path / f"launch-{next(calls)}"
        deadline = time.monotonic() + timeout_s
        processes = _start(program, world_size, args, directory)
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        for process in processes:
            process.kill()
            process.join()
        outputs = [(directory / f"{rank}.output").read_text(errors="replace") for rank in range(world_size)]
        return [(process.exitcode or 0, output) for process, output in zip(processes, outputs, strict=True)]

    return launch


@pytest.fixture
def start_rank(tmp_path: Path) -> Iterator[Callable[..., tuple[BaseProcess, Path]]]:
    """``start_rank(program, *args)``: the process of ``launch_ranks`` of one rank as it starts, and the file of its output."""
    started: list[BaseProcess] = []

    def start(program: Callable[..., Any], *args: Any) -> tuple[BaseProcess, Path]:
        directory = tmp_path / f"start-{len(started)}"
        started.extend(_start(program, 1, args, directory))
        return started[-1], directory / "0.output"

    yield start
    for process in started:
        process.kill()
        process.join()


def _start(program: Callable[..., Any], world_size: int, args: tuple[Any, ...], directory: Path) -> list[BaseProcess]:
    directory.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    main = _ByValue(functools.partial(_launched_rank, program, world_size, args, directory, environment))
    processes = [context.Process(target=main, args=(rank,), daemon=True) for rank in range(world_size)]
    for process in processes:
        process.start()
    return list(processes)


class _ByValue:
    """Pickles to what it holds; code of test files and of this file goes by value, since no other process can import it."""

    def __init__(self, value: Any) -> None:
        here = [module for module in list(sys.modules.values()) if _is_test_code(module)]
        for module in here:
            cloudpickle.register_pickle_by_value(module)
        try:
            self.pickled = cloudpickle.dumps(value)
        finally:
            for module in here:
                cloudpickle.unregister_pickle_by_value(module)

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        return cloudpickle.loads, (self.pickled,)


def _is_test_code(module: Any) -> bool:
    # text, not Path: thousands of modules are asked
    return (getattr(module, "__file__", None) or "").startswith(TESTS)


def _rank_main(
    fn: Callable[..., Any], world_size: int, args: tuple[Any, ...], directory: Path, environment: dict[str, str], rank: int
) -> None:
    _become_rank(rank, world_size, directory, environment)
    try:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
        )
        torch.save(fn(rank, world_size, *args), directory / f"{rank}.result")
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        (directory / f"{rank}.error").write_text(traceback.format_exc())
        # Not sys.exit: the process group of a failed rank may wait for its peers on the way out.
        os._exit(1)


def _launched_rank(
    program: Callable[..., Any], world_size: int, args: tuple[Any, ...], directory: Path, environment: dict[str, str], rank: int
) -> None:
    _become_rank(rank, world_size, directory, environment)
    program(rank, *args)


def _become_rank(rank: int, world_size: int, directory: Path, environment: dict[str, str]) -> None:
    # A full collection would copy every page that is shared with the server: half a second each time a run saves.
    gc.freeze()
    output = os.open(directory / f"{rank}.output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.clear()
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)


def _wait(processes: list[BaseProcess], timeout_s: float) -> bool:
    """Waits until all ended, or shortly after one failed; False if the time ran out."""
    deadline, grace = time.monotonic() + timeout_s, None
    while any(process.is_alive() for process in processes):
        if grace is None and any(process.exitcode not in (None, 0) for process in processes):
            # Others may be about to fail for the same reason; their report is worth two seconds.
            grace = time.monotonic() + 2.0
        if grace is not None and time.monotonic() > grace:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _report(processes: list[BaseProcess], directory: Path, timeout_s: float | None) -> str:
    lines = [f"of {len(processes)} ranks, some failed" if timeout_s is None else f"the ranks did not end within {timeout_s:g} s"]
    for rank, process in enumerate(processes):
        lines.append(f"--- rank {rank}: exit code {process.exitcode} (-9: still running, then killed)")
        for kind in ("output", "error"):
            with contextlib.suppress(FileNotFoundError):
                lines.append((directory / f"{rank}.{kind}").read_text(errors="replace")[-4000:])
    return "\n".join(lines)


TINY_SEMANTIC_IDS: dict[str, Any] = {"embedding_dim": 8, "min_codebook_width": 8, "dedup_width": 8, "kmeans_iterations": 5}


@pytest.fixture(scope="session")
def tiny_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with a prepared and tokenized dataset ``tiny``: 60 users, 80 items, one history of 900 events, ties in time.

    Made once; use ``tiny_workspace``, which is a private copy.
    """
    # not at the top: conftest must set the environment before these import torch
    import numpy as np
    import polars as pl

    from gbla_rec.config import PrepareConfig, SemanticIdConfig, SplitConfig
    from gbla_rec.data.prepare import prepare
    from gbla_rec.semantic_ids.tokenize import tokenize

    root = tmp_path_factory.mktemp("tiny")
    random = np.random.default_rng(0)
    lengths = np.append(random.integers(8, 60, size=59), 900)
    users = np.repeat(np.arange(60), lengths)
    # each user walks through the catalogue: the next item is predictable
    steps = random.choice([1, 1, 1, 2, 5], size=users.size)
    items = (np.cumsum(steps) + users * 7) % 80
    log = pl.DataFrame(
        {
            "user_id": users,
            "item_id": items + 2**40,
            "timestamp": np.arange(users.size) // 2,
            "kind": random.choice(["view", "buy"], size=users.size),
        }
    )
    log.write_parquet(root / "log.parquet")
    titles = [f"title {item // 10} {item}" for item in range(80)]
    pl.DataFrame({"item_id": np.arange(80) + 2**40, "title": titles}).write_parquet(root / "items.parquet")
    config = PrepareConfig(
        name="tiny",
        events=root / "log.parquet",
        items=root / "items.parquet",
        context_columns=("kind",),
        split=SplitConfig(num_targets=2),
        max_events_per_shard=1000,
    )
    dataset = prepare(config, root / "workspace" / "datasets" / "tiny")
    tokenize(dataset, SemanticIdConfig(**TINY_SEMANTIC_IDS), root / "workspace" / "semantic_ids" / "tiny")
    return root / "workspace"


@pytest.fixture
def tiny_workspace(tiny_source: Path, workspace: Path) -> Path:
    """A private workspace with the prepared and tokenized dataset ``tiny``."""
    shutil.copytree(tiny_source, workspace)
    return workspace


@pytest.fixture
def tiny_run() -> Any:
    """``tiny_run(**changes)``: the config of a run of seconds on ``tiny``; ``changes`` replace whole parts of it."""
    from gbla_rec import config as c

    def make(**changes: Any) -> c.RunConfig:
        base = c.RunConfig(
            name="tiny",
            dataset="tiny",
            semantic_ids=c.SemanticIdConfig(**TINY_SEMANTIC_IDS),
            model=c.ModelConfig(
                embedding=c.EmbeddingConfig(rows_per_table=64, dim=8, context_features=("kind",), semantic_code_dim=4),
                encoder=c.EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16, dropout=0.1),
                decoder=c.DecoderConfig(num_heads=2, ffn_dim=16, dropout=0.1),
            ),
            stream=c.StreamConfig(tokens_per_batch=300, max_history_length=100, targets_per_cut=4),
            optimizer=c.OptimizerConfig(learning_rate=5e-3, warmup_steps=2),
            training=c.TrainingConfig(num_steps=6, validate_every=3, save_every=2, log_every=1, validation_users=20),
            evaluation=c.EvaluationConfig(num_beams=10, cutoffs=(2, 5), tokens_per_batch=400, bootstrap_samples=50),
        )
        return dataclasses.replace(base, **changes)

    return make
