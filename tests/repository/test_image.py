"""The container image, as far as its files can be checked without building it."""

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from gbla_rec import workspace
from gbla_rec.checkpoint.run_directory import COMMIT_VARIABLE, code_version

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def instructions():
    text = re.sub(r"(?m)^#.*\n", "", (ROOT / "Dockerfile").read_text()).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def of_kind(kind):
    return [value for name, value in instructions() if name == kind]


def copied():
    return [source for value in of_kind("COPY") for source in value.split()[:-1]]


def is_ignored(path):
    verdict = False
    for pattern in (ROOT / ".dockerignore").read_text().splitlines():
        if (
            pattern
            and not pattern.startswith("#")
            and any(fnmatch.fnmatch(str(part), pattern.lstrip("!")) for part in (path, path.parts[0]))
        ):
            verdict = not pattern.startswith("!")
    return verdict


def test_what_is_copied_exists_and_is_sent_to_the_builder():
    assert copied()
    for source in copied():
        assert (ROOT / source).exists() and not is_ignored(Path(source)), source
    for junk in (".git", ".venv", "workspace", "tests", "docs", ".env", "core.1"):
        assert is_ignored(Path(junk)), junk


def test_every_package_and_what_the_components_run_is_copied():
    packages = PROJECT["tool"]["setuptools"]["packages"]["find"]["where"]
    assert {"gbla_rec", *packages} - {"."} <= set(copied())
    # torchx/components.py:benchmark, and the log of the recipe movielens_small
    assert {"benchmarks", "examples"} <= set(copied())
    assert {"pyproject.toml", "constraints.txt", PROJECT["project"]["readme"], *PROJECT["project"]["license-files"]} <= set(copied())


def test_versions_come_from_the_constraints_alone():
    installs = re.findall(r"\bpip install [^&\n]*", "\n".join(of_kind("RUN")))
    assert len(installs) == 2 and all("-c constraints.txt" in install and "==" not in install for install in installs)
    pins = dict(re.findall(r"(?m)^([A-Za-z0-9_.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text()))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    extras = re.search(r"\.\[([\w,]+)\]", installs[0])[1].split(",")
    # served metrics, wordllama's texts, plots, and softmax attention at full speed
    assert {"metrics", "text", "report", "benchmarks", "cudnn"} <= set(extras)
    optional = [line for extra in extras for line in PROJECT["project"]["optional-dependencies"][extra]]
    for line in [*PROJECT["project"]["dependencies"], *optional]:
        requirement = Requirement(line)
        assert requirement.specifier.contains(pins[requirement.name]), f"{line} is not met by the pin {pins[requirement.name]}"


def test_the_base_has_a_version_and_can_be_replaced():
    (base,) = [value.removeprefix("BASE=") for value in of_kind("ARG") if value.startswith("BASE=")]
    assert of_kind("FROM") == ["${BASE}"] and re.fullmatch(r"[\w./-]+:\d[\w.-]*", base)


def test_the_container_runs_unprivileged_without_an_entrypoint_and_can_be_examined():
    assert of_kind("ENTRYPOINT") == ["[]"]
    (health,) = of_kind("HEALTHCHECK")
    assert json.loads(health[health.index("[") :]) == ["gbla-rec", "doctor"]
    names = [name for name, _ in instructions()]
    assert "USER" in names and "RUN" not in names[names.index("USER") :]
    (uid,) = [value.removeprefix("UID=") for value in of_kind("ARG") if value.startswith("UID=")]
    assert of_kind("USER") == ["${UID}"] and int(uid) > 0
    assert any(f"{workspace.VARIABLE}=/workspace" in value for value in of_kind("ENV"))


def test_layers_keep_no_package_caches():
    (apt,) = [value for value in of_kind("RUN") if "apt-get" in value]
    assert "rm -rf /var/lib/apt/lists/*" in apt and "--no-install-recommends" in apt
    assert any("PIP_NO_CACHE_DIR=1" in value for value in of_kind("ENV"))


@pytest.mark.parametrize(("given", "commit"), [("abc123", "abc123"), ("", None)])
def test_a_run_in_the_image_names_its_commit_without_git(monkeypatch, tmp_path, given, commit):
    assert any(f"{COMMIT_VARIABLE}=${{COMMIT}}" in value for value in of_kind("ENV"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv(COMMIT_VARIABLE, given)
    assert code_version()["commit"] == commit
