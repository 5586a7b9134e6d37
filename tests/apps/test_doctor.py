"""gbla-rec doctor: each fault of an environment is a finding with its cure, never a traceback, and a sound one passes."""

import errno
import importlib.metadata
import json
import os
import resource
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gbla_rec.doctor import examine, gloo, gpu, packages, storage
from gbla_rec.doctor.finding import Finding, Status
from gbla_rec.doctor.probe import ProbeError, probe
from gbla_rec.models import cudnn_attention, jagged_attention
from gbla_rec.versions import check_versions

CHECKS = """gbla-rec; python; torch; torchrec; fbgemm-gpu; triton; numpy; torchx; other packages; pairing; import torch; import triton
    import torchrec; fbgemm on cpu; gloo; cuda; nccl; gpu architecture; bf16; gpu memory; c compiler; triton cache; workspace; free space
    shared memory; open files""".replace("\n", ";").split(";")
NAMES = {name.strip() for name in CHECKS}
HOPPER = gpu.Gpu(name="H100", capability=(9, 0), shared_memory_bytes=232_448, total_bytes=80 * 2**30, free_bytes=79 * 2**30, error=None)


def doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    finished = subprocess.run(
        [sys.executable, "-m", "gbla_apps.cli", "doctor", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert "Traceback" not in finished.stdout + finished.stderr
    return finished


def findings(finished: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    by_check = {finding["check"]: finding for finding in json.loads(finished.stdout)}
    for finding in by_check.values():
        assert set(finding) == {"check", "status", "found", "cure"} and finding["found"]
        assert (finding["cure"] is None) == (finding["status"] == "ok")
    return by_check


def assert_problem(finding: Finding | dict[str, Any], found: str, cure: str) -> None:
    fields = finding if isinstance(finding, dict) else {"status": finding.status, "found": finding.found, "cure": finding.cure}
    assert fields["status"] == "problem", fields
    assert found in fields["found"], fields
    assert cure in fields["cure"], fields


def plant(directory: Path, package: str, text: str) -> str:
    """A package that shadows an installed one; returns the directory for PYTHONPATH."""
    (directory / package).mkdir(parents=True)
    (directory / package / "__init__.py").write_text(text)
    return str(directory)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends that some distributions have other versions; None: not installed."""
    real = importlib.metadata.version

    def pretend(**changed: str | None) -> None:
        def version(name: str) -> str:
            found = changed.get(name.replace("-", "_"), real)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name) if found is real else str(found)

        monkeypatch.setattr(importlib.metadata, "version", version)
        check_versions.cache_clear()

    yield pretend
    monkeypatch.undo()
    check_versions.cache_clear()


@pytest.mark.slow
def test_this_environment_passes_and_every_check_has_a_line(workspace: Path) -> None:
    finished = doctor()
    assert finished.returncode == 0, finished.stdout
    lines = [line for line in finished.stdout.splitlines() if line.startswith(tuple(Status))]
    assert {line[9:27].strip() for line in lines if not line.startswith("ok: ")} >= NAMES
    assert "problem: 0" in finished.stdout
    assert not workspace.exists(), "the doctor must leave nothing behind"


@pytest.mark.slow
def test_planted_faults_are_found_together_with_their_cures(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    finished = doctor(
        "--json",
        PYTHONPATH=plant(tmp_path / "site", "torchrec", "raise OSError('libplanted.so: undefined symbol: planted')"),
        GBLA_REC_WORKSPACE=str(tmp_path / "file" / "workspace"),
        TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"),
        GLOO_SOCKET_IFNAME="planted0",
    )
    assert finished.returncode == 1
    found = findings(finished)
    assert set(found) >= NAMES
    assert_problem(found["import torchrec"], "undefined symbol: planted", "torch 2.(X + 5) belongs to torchrec 1.X")
    assert str(tmp_path / "site") in found["import torchrec"]["found"]
    assert_problem(found["workspace"], "Not a directory", "a part of the path is a file: remove it; or set GBLA_REC_WORKSPACE")
    assert_problem(found["gloo"], "rank 0: ", "GLOO_SOCKET_IFNAME must name an interface of this machine (lo")
    assert "got 'planted0'" in found["gloo"]["cure"]
    assert found["triton cache"]["status"] != "ok" and "TRITON_CACHE_DIR" in found["triton cache"]["cure"]
    assert {name for name, finding in found.items() if finding["status"] == "problem"} <= {
        "import torchrec",
        "workspace",
        "gloo",
        "triton cache",
    }


def test_without_torch_and_without_any_library_of_the_command_line_it_still_reports(tmp_path: Path) -> None:
    for package in ("torch", "triton", "torchrec", "fbgemm_gpu", "tyro", "rich", "numpy", "polars"):
        plant(tmp_path, package, f"raise ImportError('no {package} here')")
    finished = doctor("--json", PYTHONPATH=str(tmp_path))
    assert finished.returncode == 1
    found = findings(finished)
    assert set(found) >= NAMES
    assert_problem(found["import torch"], "no torch here", "pip install --force-reinstall")
    for name in examine.NEEDS_TORCH:
        assert found[name]["status"] == "warning" and "not checked" in found[name]["found"]


def test_a_wrong_pair_is_a_finding_and_refused_by_what_imports_torchrec(tmp_path: Path) -> None:
    (tmp_path / "torchrec-1.2.0.dist-info").mkdir()
    (tmp_path / "torchrec-1.2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: torchrec\nVersion: 1.2.0\n")
    plant(tmp_path, "torch", "raise ImportError('the check must come before the import')")
    found = findings(doctor("--json", PYTHONPATH=str(tmp_path)))
    assert_problem(found["torchrec"], "1.2.0, must be ", "make install")
    assert_problem(found["pairing"], "torchrec 1.2.0 was not built for torch", "pip install 'torchrec==1.")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    for package in ("data.batch", "models.embeddings", "checkpoint.sharding", "training.trainer"):
        command = [sys.executable, "-c", f"import gbla_rec.{package}"]
        refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert "ImportError: torchrec 1.2.0 was not built for torch" in refused.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os; os.abort()", "ended by SIGABRT"),
        ("import sys; sys.exit('no licence')", "SystemExit: no licence"),
        ("import os; os._exit(0)", "ended without an answer"),
        ("import os, sys; print('loader: no', file=sys.stderr, flush=True); os._exit(3)", "exit status 3: loader: no"),
        ("import time; time.sleep(60)", "no answer within 3 s"),
    ],
)
def test_a_library_that_ends_or_blocks_its_process_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    monkeypatch.setenv("PYTHONPATH", plant(tmp_path, "planted", text))
    with pytest.raises(ProbeError, match=message):
        probe("import_package", "planted", timeout_s=3)


def test_a_version_out_of_range_names_the_range_and_the_command(versions: Any) -> None:
    versions(torch="2.9.1+cu128", torchx="0.8.0", polars="1.0.0")
    assert_problem(packages.package_version("torch"), "2.9.1+cu128, must be ", "pip install 'torch")
    assert_problem(packages.other_packages(), "polars: 1.0.0, must be >=2.0", "pip install 'polars>=2.0'")
    assert packages.torchx_version().status is Status.WARNING
    assert_problem(packages.pairing(), "was not built for torch 2.9.1+cu128", "pip install 'torchrec==1.4.*' 'fbgemm-gpu==1.4.*'")


def test_a_missing_package_is_named(versions: Any) -> None:
    versions(triton=None, torchx=None)
    assert_problem(packages.package_version("triton"), "not installed", "pip install 'triton>=3.6'")
    assert packages.torchx_version().status is Status.OK
    versions(torch=None)
    assert_problem(packages.pairing(), "torch is not installed", "run: make install")
    versions(gbla_rec=None)
    assert_problem(packages.own_version(), "not installed", "make install")
    assert packages.package_version("numpy").status is Status.OK


@pytest.mark.parametrize(
    ("version", "rule", "is_inside"),
    [
        ("2.11.0+cu130", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11", False),
        ("0.7.0", "==0.7", True),
        ("0.7.1", "==0.7.0", False),
        ("2.12.1a0+git1234", "<2.14,>=2.11", True),
        ("1.0", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_ranges_are_compared_by_number(version: str, rule: str, is_inside: bool) -> None:
    assert packages.satisfies(version, rule) == is_inside


def test_the_builds_of_fbgemm_are_told_apart(versions: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    versions(fbgemm_gpu="1.8.0+cpu", fbgemm_gpu_cpu="1.8.0")
    assert "the shim in front of fbgemm-gpu-cpu 1.8.0" in packages.fbgemm_version().found
    versions(fbgemm_gpu="1.8.0", fbgemm_gpu_cpu=None)
    assert "the CUDA wheel" in packages.fbgemm_version().found
    versions(fbgemm_gpu="1.8.0", fbgemm_gpu_cpu="1.8.0")
    assert_problem(packages.fbgemm_version(), "written into one directory", "pip uninstall fbgemm-gpu fbgemm-gpu-cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    versions(fbgemm_gpu="1.8.0+cpu", fbgemm_gpu_cpu=None)
    assert_problem(packages.fbgemm_version(), "holds no code", "make install")


def test_a_limit_on_the_size_of_files_is_named(tmp_path: Path) -> None:
    code = "from gbla_rec.doctor.storage import workspace_writable as w; f = w(); print(f.status, f.found, f.cure, sep='|')"
    finished = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "GBLA_REC_WORKSPACE": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        capture_output=True,
        text=True,
        check=True,
    )
    status, found, cure = finished.stdout.strip().split("|")
    assert_problem({"status": status, "found": found, "cure": cure}, "File too large", "ulimit -f unlimited")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.rename"])
def test_a_full_disk_is_named_and_nothing_is_left(workspace: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    workspace.mkdir()
    monkeypatch.setattr(step, full)
    assert_problem(storage.workspace_writable(), "No space left on device", "free space there; or set GBLA_REC_WORKSPACE")
    assert list(workspace.iterdir()) == []


def test_little_room_and_low_limits_are_warnings(workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "MIN_FREE_BYTES", 2**80)
    assert storage.free_space().status is Status.WARNING
    monkeypatch.setattr(storage, "MIN_SHARED_MEMORY_BYTES", 2**80)
    assert "--shm-size" in str(storage.shared_memory(tmp_path).cure)
    assert storage.shared_memory(tmp_path / "absent").status is Status.WARNING
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (256, 4096))
    assert "ulimit -n" in str(storage.open_files().cure)
    monkeypatch.setattr(resource, "getrlimit", lambda limit: (256, 256))
    assert "raise the hard limit, 256" in str(storage.open_files().cure)


def test_a_hostname_that_does_not_resolve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(name: str) -> str:
        raise socket.gaierror("unknown")

    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", unknown)
    assert "does not resolve: export GLOO_SOCKET_IFNAME=lo" in gloo.gloo_cure()


def gpus(*devices: gpu.Gpu, built_for: str | None = "13.0", error: str | None = None) -> gpu.Gpus:
    return gpu.Gpus(built_for=built_for, error=error, devices=devices)


def test_hopper_passes() -> None:
    for check in (gpu.architecture, gpu.bf16, gpu.gpu_memory):
        assert check(gpus(HOPPER)).status is Status.OK
    assert gpu.cuda(gpus(HOPPER), ["H100, 580.1"]).status is Status.OK


def test_other_architectures_are_told_what_differs() -> None:
    ada = replace(HOPPER, name="L4", capability=(8, 9), shared_memory_bytes=101_376)
    finding = gpu.architecture(gpus(ada))
    assert finding.status is Status.WARNING
    assert "varlen_attn" in finding.found and "less shared memory" in finding.found
    assert "varlen_attn" not in gpu.architecture(gpus(replace(HOPPER, capability=(10, 0)))).found
    turing = gpus(replace(HOPPER, name="T4", capability=(7, 5)))
    assert_problem(gpu.architecture(turing), "refused below 8.0", "CUDA_VISIBLE_DEVICES=")
    assert_problem(gpu.bf16(turing), "needs compute capability 8.0", "CUDA_VISIBLE_DEVICES=")


def test_slow_attention_over_unlike_rows_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.ragged_attention(gpus()).status is Status.OK
    monkeypatch.setattr(gpu, "installed", lambda name: None)
    finding = gpu.ragged_attention(gpus(HOPPER))
    assert finding.status is Status.WARNING and "varlen_attn" in finding.found and "gbla-rec[cudnn]" in str(finding.cure)
    monkeypatch.setattr(gpu, "installed", lambda name: "1.22.1")
    assert gpu.ragged_attention(gpus(HOPPER)).status is Status.OK


def test_the_capabilities_are_those_of_the_models() -> None:
    assert gpu.BF16_CAPABILITY == jagged_attention.FLASH_CAPABILITY
    assert gpu.MEASURED_CAPABILITY == cudnn_attention.MIN_CAPABILITY


def test_a_gpu_that_torch_cannot_use_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    without = gpu.cuda(gpus(built_for=None), [])
    assert without.status is Status.WARNING and "run on the CPU" in str(without.cure)
    assert "DEVICE=cuda" in str(gpu.cuda(gpus(built_for=None), ["H100, 580.1"]).cure)
    old_driver = gpus(error="RuntimeError: The NVIDIA driver on your system is too old")
    assert_problem(gpu.cuda(old_driver, ["H100, 470.1"]), "driver on your system is too old", "install a driver for CUDA 13.0")
    crashed = gpus(built_for=None, error="ended by SIGSEGV")
    assert_problem(gpu.cuda(crashed, []), "could not be asked for its devices: ended by SIGSEGV", "nvidia-smi")
    broken = gpus(replace(HOPPER, error="RuntimeError: no kernel image is available"))
    assert_problem(gpu.cuda(broken, ["H100, 580.1"]), "no kernel image", "torch built for this architecture")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in str(gpu.cuda(gpus(), ["H100, 580.1"]).cure)


def test_a_gpu_in_use_is_a_warning() -> None:
    finding = gpu.gpu_memory(gpus(replace(HOPPER, free_bytes=2**30)))
    assert finding.status is Status.WARNING and "nvidia-smi" in str(finding.cure)


def test_triton_needs_a_compiler_that_finds_the_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "cc"))
    assert_problem(gpu.compiler(gpus(HOPPER)), "does not run", "set CC to a compiler")
    assert gpu.compiler(gpus()).status is Status.OK
    (tmp_path / "cc").write_text("#!/bin/sh\necho 'Python.h: No such file' >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    assert_problem(gpu.compiler(gpus(HOPPER)), "Python.h: No such file", "python3-dev")
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_problem(gpu.compiler(gpus(HOPPER)), "neither gcc nor clang", "apt-get install gcc")


def test_a_triton_cache_that_cannot_be_written_is_a_problem_with_a_gpu_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert_problem(gpu.triton_cache(gpus(HOPPER)), "Not a directory", "TRITON_CACHE_DIR")
    assert gpu.triton_cache(gpus()).status is Status.WARNING


def test_a_user_without_a_home_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    for variable in ("HOME", "TRITON_HOME", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    # Triton, too, then takes a directory called ~
    assert gpu.triton_cache_dir() == Path("~/.triton/cache")
