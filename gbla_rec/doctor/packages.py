"""Installed versions against what gbla-rec asks for, and whether the compiled packages load."""

import importlib.metadata
import importlib.util
import platform
import re

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from gbla_rec.doctor.finding import Finding, ok, problem, warning
from gbla_rec.doctor.probe import ProbeError, probe
from gbla_rec.versions import FBGEMM_NAMES, MINOR_OFFSET, check_versions

DISTRIBUTION = "gbla-rec"
NAMED = ("torch", "torchrec", "fbgemm-gpu", "triton", "numpy")
"""Requirements with a line of their own; the others share one."""
PAIRING_RULE = f"torch 2.(X + {MINOR_OFFSET}) belongs to torchrec 1.X and fbgemm-gpu 1.X"


def own_version() -> Finding:
    """gbla-rec itself: without its metadata no range is known."""
    version = installed(DISTRIBUTION)
    if version is None:
        return problem(DISTRIBUTION, "not installed, so what it requires is not known", "run: make install")
    return ok(DISTRIBUTION, version)


def python_version() -> Finding:
    """The interpreter against Requires-Python."""
    version = platform.python_version()
    rule = "" if installed(DISTRIBUTION) is None else importlib.metadata.metadata(DISTRIBUTION)["Requires-Python"] or ""
    if not satisfies(version, rule):
        return problem("python", f"{version}, must be {rule}", "remove .venv, then run: make install PYTHON=python3.12")
    return ok("python", f"{version} (asked: {rule or 'unknown'})")


def package_version(name: str) -> Finding:
    """One requirement of gbla-rec."""
    version, rule = installed(name), requirements().get(name, "")
    if version is None:
        return problem(name, f"not installed, must be {rule or 'there'}", _install(name, rule))
    if not satisfies(version, rule):
        return problem(name, f"{version}, must be {rule}", _install(name, rule))
    return ok(name, f"{version} (asked: {rule or 'unknown'})")


def fbgemm_version() -> Finding:
    """fbgemm-gpu, which comes as a CUDA wheel, as a CPU wheel, or as a shim without code in front of fbgemm-gpu-cpu."""
    check, cpu_name = FBGEMM_NAMES
    version, cpu_version = installed(check), installed(cpu_name)
    if version is None and cpu_version is not None:
        return ok(check, f"{cpu_name} {cpu_version}, CPU only (pip will say that torchrec misses {check})")
    finding = package_version(check)
    if version is None or finding.cure is not None:
        return finding
    is_cpu = version.endswith("+cpu")
    if is_cpu and cpu_version is not None:
        return ok(check, f"{finding.found}: the shim in front of {cpu_name} {cpu_version}, CPU only")
    if cpu_version is not None:
        cure = f"pip uninstall {check} {cpu_name}, then install one of them: make install"
        return problem(check, f"{check} {version} and {cpu_name} {cpu_version} were written into one directory, which must hold one", cure)
    if importlib.util.find_spec("fbgemm_gpu") is None:
        return problem(check, f"{version} holds no code (import fbgemm_gpu finds nothing)", f"{PAIRING_RULE}: {pairing_cure()}")
    return ok(check, f"{finding.found}: the {'CPU' if is_cpu else 'CUDA'} wheel")


def torchx_version() -> Finding:
    """The optional launcher."""
    version, rule = installed("torchx"), requirements("torchx").get("torchx", "")
    if version is None:
        return ok("torchx", f"not installed; only a machine that submits jobs needs it: pip install '{DISTRIBUTION}[torchx]'")
    if not satisfies(version, rule):
        return warning("torchx", f"{version}, must be {rule} for torchx/components.py", _install("torchx", rule))
    return ok("torchx", f"{version} (asked: {rule or 'unknown'})")


def other_packages() -> Finding:
    """All other requirements of gbla-rec, in one line."""
    findings = [package_version(name) for name in requirements() if name not in NAMED]
    wrong = [finding for finding in findings if finding.cure is not None]
    if wrong:
        found = "; ".join(f"{finding.check}: {finding.found}" for finding in wrong)
        return problem("other packages", found, "; ".join(finding.cure or "" for finding in wrong))
    return ok("other packages", ", ".join(f"{finding.check} {installed(finding.check)}" for finding in findings) or "none known")


def pairing() -> Finding:
    """Whether torch, torchrec and fbgemm-gpu were built for each other."""
    try:
        check_versions()
    except ImportError as error:
        # its cure names one package, this one all three
        found = re.split(r"[:;] (?:run|install)\b", str(error))[0]
        return problem("pairing", found, f"{PAIRING_RULE}: {pairing_cure()}")
    return ok("pairing", PAIRING_RULE)


def pairing_cure() -> str:
    """How to install what belongs to the installed torch."""
    match = re.match(r"2\.(\d+)", installed("torch") or "")
    minor = int(match[1]) - MINOR_OFFSET if match else -1
    if minor < 0:
        return "run: make install"
    on_cpu = f"'fbgemm-gpu-cpu==1.{minor}.*' in its place without a GPU"
    return f"run `make install`, or `pip install 'torchrec==1.{minor}.*' 'fbgemm-gpu==1.{minor}.*'` ({on_cpu})"


def package_import(name: str) -> Finding:
    """Whether a package can be imported."""
    check = f"import {name}"
    try:
        return ok(check, str(probe("import_package", name)["file"]))
    except ProbeError as error:
        spec = importlib.util.find_spec(name)
        return problem(check, f"{error}{f' ({spec.origin})' if spec and spec.origin else ''}", _import_cure(name))


def fbgemm_operators(device: str) -> Finding:
    """Whether fbgemm's compiled operators load and compute on ``device``."""
    check = f"fbgemm on {device}"
    try:
        probe("jagged_operators", device)
    except ProbeError as error:
        if device == "cuda":
            cure = "the CPU build has no CUDA operators; remove .venv, then run: make install DEVICE=cuda"
            return problem(check, str(error), f"{PAIRING_RULE}, and GPUs need the CUDA wheel: {cure}")
        return problem(check, str(error), f"{PAIRING_RULE}: {pairing_cure()}")
    return ok(check, "torch.ops.fbgemm pads a jagged batch")


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def requirements(extra: str = "") -> dict[str, str]:
    """Version rules by distribution, of gbla-rec or of one of its extras alone; nothing if gbla-rec is not installed."""
    if installed(DISTRIBUTION) is None:
        return {}
    found = [Requirement(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]
    if extra:
        found = [one for one in found if one.marker is not None and not one.marker.evaluate({"extra": ""})]
    return {one.name: str(one.specifier) for one in found if one.marker is None or one.marker.evaluate({"extra": extra})}


def satisfies(version: str, rule: str) -> bool:
    """Whether a version lies in a range such as ``>=2.11,<2.14``; a pre-release may, what is no version does not."""
    try:
        return SpecifierSet(rule).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return False


def _install(name: str, rule: str) -> str:
    return f"run `make install` for the tested versions, or: pip install '{name}{rule}'"


def _import_cure(name: str) -> str:
    if name in ("torchrec", "fbgemm_gpu"):
        return f"{PAIRING_RULE}: {pairing_cure()}; if the versions agree, a local directory may shadow the package: see PYTHONPATH"
    return f"install it anew: pip install --force-reinstall --no-deps '{name}{requirements().get(name, '')}'"
