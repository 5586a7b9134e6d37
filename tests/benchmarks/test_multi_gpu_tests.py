"""The report of the tests of several GPUs says of each test what pytest said."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "multi_gpu_tests.py"
TESTS = """
import pytest

pytestmark = pytest.mark.multi_gpu


@pytest.fixture
def broken():
    raise RuntimeError("torchrun ended")


def test_that_passes():
    pass


@pytest.mark.parametrize("ranks", [2, 4])
def test_that_needs_two(ranks):
    if ranks == 4:
        pytest.skip("needs four CUDA devices")


def test_that_fails():
    assert False


def test_that_does_not_begin(broken):
    pass
"""


def run(directory: Path, tests: str) -> subprocess.CompletedProcess[str]:
    (directory / "test_ranks.py").write_text(tests)
    command = [sys.executable, str(SCRIPT), "--tests", str(directory / "test_ranks.py"), "--directory", str(directory / "report")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_each_outcome_is_written_and_the_status_is_that_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBLA_REC_TEST_CPU_RANKS", "2")
    finished = run(tmp_path, TESTS)
    assert finished.returncode == 1, finished.stdout + finished.stderr
    report = json.loads((tmp_path / "report" / "multi_gpu_tests.json").read_text())
    assert {row["test"]: row["outcome"] for row in report["rows"]} == {
        "test_that_passes": "passed",
        "test_that_needs_two[2]": "passed",
        "test_that_needs_two[4]": "skipped: needs four CUDA devices",
        "test_that_fails": "failed",
        "test_that_does_not_begin": "failed",
    }
    assert "on 2 gloo ranks: 2 passed, 1 skipped, 2 failed." in report["notes"]
    assert report["command"].startswith("GBLA_REC_TEST_CPU_RANKS=2 python ")


@pytest.mark.usefixtures("benchmarks_on_path")
def test_a_report_of_failures_does_not_replace_the_committed_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GBLA_REC_TEST_CPU_RANKS", raising=False)
    monkeypatch.setenv("GBLA_REC_WORKSPACE", str(tmp_path / "workspace"))
    multi_gpu_tests = importlib.import_module("multi_gpu_tests")
    monkeypatch.setattr(multi_gpu_tests.torch.cuda, "device_count", lambda: 2)
    (tmp_path / "test_ranks.py").write_text(TESTS)
    monkeypatch.setattr(sys, "argv", ["multi_gpu_tests.py", "--tests", str(tmp_path / "test_ranks.py")])
    written: list[Path] = []
    monkeypatch.setattr(multi_gpu_tests, "write_report", lambda *_, directory: written.append(directory))
    assert multi_gpu_tests.main() == 1
    assert written == [tmp_path / "workspace" / "benchmarks"]


def test_no_report_is_written_where_no_test_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBLA_REC_TEST_CPU_RANKS", "2")
    finished = run(tmp_path, "def test_without_the_marker():\n    pass\n")
    assert finished.returncode != 0 and "no test ran" in finished.stdout
    assert not (tmp_path / "report").exists()


def test_without_gpus_it_says_so_and_succeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GBLA_REC_TEST_CPU_RANKS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    finished = run(tmp_path, TESTS)
    assert (finished.returncode, finished.stdout) == (0, "multi_gpu_tests.py: skipped, it needs 2 CUDA GPUs\n")
    assert not (tmp_path / "report").exists()
