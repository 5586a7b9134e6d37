"""The wheel holds the three packages and nothing else of the repository."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PARTS = ["pyproject.toml", "LICENSE", "README.md", "gbla_rec", "kernels", "apps", "torchx", "tests", "packaging", "benchmarks", "examples"]


@pytest.mark.slow
def test_the_wheel_contains_the_three_packages_only(tmp_path):
    source, out = tmp_path / "source", tmp_path / "wheel"
    source.mkdir()
    for part in PARTS:
        path = ROOT / part
        if path.is_dir():
            shutil.copytree(path, source / part, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "data"))
        elif path.exists():
            shutil.copy(path, source / part)
    # data directories of examples are large and never packaged; gbla_rec/data is a package
    shutil.copytree(ROOT / "gbla_rec" / "data", source / "gbla_rec" / "data", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", out, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (wheel,) = out.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"gbla_rec", "gbla_kernels", "gbla_apps"}
    for package in ("gbla_rec", "kernels/gbla_kernels", "apps/gbla_apps"):
        modules = {str(path.relative_to((ROOT / package).parent)) for path in (ROOT / package).rglob("*.py")}
        assert modules <= set(names), f"missing from the wheel: {sorted(modules - set(names))}"
    assert {"gbla_rec/py.typed", "gbla_kernels/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
