"""Guards of the tree: what may be a package, what an import name resolves to, what the kernels may need."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("directory", ["torchx", "kernels", "apps", "packaging", "benchmarks", "examples"])
def test_top_level_directories_are_no_packages(directory):
    assert not (ROOT / directory / "__init__.py").exists(), f"remove {directory}/__init__.py: it shadows an installed package"


def test_the_tests_are_no_package():
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_torchx_from_the_repository_root_is_the_installed_one():
    command = [sys.executable, "-c", "import torchx.specs; print(torchx.specs.__file__)"]
    found = Path(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip())
    assert "site-packages" in found.parts


@pytest.mark.parametrize("name", ["kernels", "apps"])
def test_no_generic_import_name_is_installed(name, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT])
    found = importlib.util.find_spec(name)
    assert found is None or not str(found.origin).startswith(str(ROOT))


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_the_kernels_import_torch_and_triton_only():
    allowed = {"gbla_kernels", "torch", "triton"} | sys.stdlib_module_names
    strangers = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in (ROOT / "kernels").rglob("*.py")
        for name in imported_modules(path)
        if name.partition(".")[0] not in allowed
    }
    assert strangers == set()


def test_every_make_target_that_the_readme_names_exists():
    named = set(re.findall(r"\bmake ([a-z]+)\b", "\n".join(re.findall(r"(?s)```.*?```|`[^`]+`", (ROOT / "README.md").read_text()))))
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    assert named and named <= targets


def test_the_constraints_pin_a_matching_torch_torchrec_and_fbgemm():
    pins = dict(re.findall(r"(?m)^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    shim = (ROOT / "packaging/fbgemm-gpu-cpu-shim/pyproject.toml").read_text()
    minor = int(pins["torch"].split(".")[1]) - 5
    assert pins["torchrec"].startswith(f"1.{minor}.") and pins["fbgemm-gpu"].startswith(f"1.{minor}.")
    assert f'version = "{pins["fbgemm-gpu"]}+cpu"' in shim and f'"fbgemm-gpu-cpu=={pins["fbgemm-gpu-cpu"]}"' in shim


def test_reports_name_no_directory_of_the_machine_that_made_them():
    reports = [path for path in (ROOT / "benchmarks" / "results").rglob("*") if path.suffix in (".json", ".md")]
    ours = re.compile(r"(?<![\w.-])/(?:root|home|mnt|work|workspace|Users)/\S*")
    found = {f"{path.relative_to(ROOT)}: {match}" for path in reports for match in ours.findall(path.read_text())}
    assert reports and found == set()
