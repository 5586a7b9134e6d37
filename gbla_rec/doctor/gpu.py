"""CUDA devices against what training and the Triton kernels need."""

import os
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gbla_rec.doctor.finding import Finding, ok, problem, warning
from gbla_rec.doctor.packages import installed
from gbla_rec.doctor.probe import ProbeError, probe
from gbla_rec.doctor.storage import GIB, try_directory, write_cure

BF16_CAPABILITY = (8, 0)
"""Training computes in bf16, for which jagged softmax attention has kernels from here on."""
MEASURED_CAPABILITY = (9, 0)
"""Hopper: the kernels' launch parameters were measured there, and cuDNN's fused attention is used from here on."""
CUDNN_FRONTEND = "nvidia-cudnn-frontend"
"""The distribution of the extra ``cudnn``."""
MEASURED_SHARED_MEMORY_BYTES = 232_448
"""What a program may use on Hopper."""
MIN_FREE_BYTES = 8 * GIB
NO_GPU = "no CUDA device"
ON_CPU = (
    "prepare, tokenize, train, evaluate and recommend run on the CPU (gloo, reference kernels, fp32, slowly); "
    "--model.kernels triton is refused"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """A CUDA device; ``error`` says why it could not compute."""

    name: str
    capability: tuple[int, int]
    shared_memory_bytes: int | None
    total_bytes: int
    free_bytes: int | None
    error: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpus:
    """The CUDA that torch was built for (None: without), the devices that it sees, and why it sees none."""

    built_for: str | None
    error: str | None
    devices: tuple[Gpu, ...]


def visible_gpus() -> Gpus:
    """Ask torch, in another process."""
    try:
        found = probe("gpus")
    except ProbeError as error:
        return Gpus(built_for=None, error=str(error), devices=())
    devices = tuple(Gpu(**{**device, "capability": tuple(device["capability"])}) for device in found["devices"])
    return Gpus(built_for=found["built_for"], error=found["error"], devices=devices)


def listed_gpus() -> list[str]:
    """Name and driver version of what ``nvidia-smi`` lists, or the device files where it does not run."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return [f"{path} (nvidia-smi does not run)" for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]
    return [line.strip() for line in finished.stdout.splitlines() if line.strip()]


def cuda(gpus: Gpus, listed: list[str]) -> Finding:
    """Whether torch sees the GPUs of the machine."""
    built = f"torch is built for CUDA {gpus.built_for}" if gpus.built_for else "torch is built without CUDA"
    driver = f"the machine has {len(listed)} GPU(s): {listed[0]}" if listed else "nvidia-smi lists no GPU"
    if gpus.devices:
        names = ", ".join(gpu.name for gpu in gpus.devices)
        broken = [f"{gpu.name}: {gpu.error}" for gpu in gpus.devices if gpu.error]
        if broken:
            cure = "install a torch built for this architecture and driver; if another process holds the GPU (nvidia-smi), end it"
            return problem("cuda", f"{built}, but a device does not compute: {'; '.join(broken)}", cure)
        return ok("cuda", f"{built}, {len(gpus.devices)} device(s): {names}; {driver}")
    reason = f" ({gpus.error})" if gpus.error else ""
    if gpus.error and gpus.built_for is None:
        cure = "see that `nvidia-smi` answers; hide the GPUs to train on the CPU: CUDA_VISIBLE_DEVICES="
        return problem("cuda", f"torch could not be asked for its devices: {gpus.error}; {driver}", cure)
    if not listed:
        return warning("cuda", f"{built}; no device{reason}; {driver}", f"none is needed: {ON_CPU}. In a container: docker run --gpus all")
    if gpus.built_for is None:
        return warning("cuda", f"{built}, but {driver}", "to train on it, remove .venv, then run: make install DEVICE=cuda")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        cure = "unset CUDA_VISIBLE_DEVICES, or name devices that exist"
        return warning("cuda", f"{built}, but CUDA_VISIBLE_DEVICES={hidden!r} shows no device{reason}; {driver}", cure)
    cure = f"install a driver for CUDA {gpus.built_for}, or a torch for the driver's CUDA (nvidia-smi shows it)"
    return problem("cuda", f"{built}, but sees no device{reason}; {driver}", cure)


def architecture(gpus: Gpus) -> Finding:
    """Compute capability against the kernels'."""
    check = "gpu architecture"
    if not gpus.devices:
        return ok(check, NO_GPU)
    found = ", ".join(f"{gpu.name}: {_dotted(gpu.capability)}" for gpu in gpus.devices)
    if any(gpu.capability < BF16_CAPABILITY for gpu in gpus.devices):
        rule = f"softmax attention in bf16 is refused below {_dotted(BF16_CAPABILITY)}"
        return problem(check, f"{found}; {rule}", "take another GPU, or train on the CPU: CUDA_VISIBLE_DEVICES= gbla-rec train")
    if all(gpu.capability == MEASURED_CAPABILITY for gpu in gpus.devices):
        return ok(check, f"{found}; the kernels were measured on it (Hopper)")
    notes = [f"the kernels were measured on Hopper ({_dotted(MEASURED_CAPABILITY)}) and run its launch parameters elsewhere"]
    if any(gpu.capability < MEASURED_CAPABILITY for gpu in gpus.devices):
        notes.append("softmax attention runs varlen_attn, not cuDNN's faster kernel")
    if any((gpu.shared_memory_bytes or MEASURED_SHARED_MEMORY_BYTES) < MEASURED_SHARED_MEMORY_BYTES for gpu in gpus.devices):
        notes.append("there is less shared memory than on Hopper: Triton may refuse wide heads")
    cure = "measure: python benchmarks/gbla_layer.py; where a kernel is refused: --model.kernels reference, or narrower heads"
    return warning(check, f"{found}; {'; '.join(notes)}", cure)


def ragged_attention(gpus: Gpus) -> Finding:
    """Whether softmax attention has its fast kernel for rows of unlike lengths."""
    check = "softmax attention"
    if not any(gpu.capability >= MEASURED_CAPABILITY for gpu in gpus.devices):
        return ok(check, "no device from Hopper on")
    version = installed(CUDNN_FRONTEND)
    if version is None:
        found = f"{CUDNN_FRONTEND} is not installed: rows of unlike lengths run torch's varlen_attn, not cuDNN's faster kernel"
        return warning(check, found, "install it: pip install 'gbla-rec[cudnn]'")
    return ok(check, f"{CUDNN_FRONTEND} {version}")


def bf16(gpus: Gpus) -> Finding:
    """Whether the devices compute in bf16, as training does on CUDA."""
    if not gpus.devices:
        return ok("bf16", f"{NO_GPU}; the CPU trains in fp32")
    lacking = [gpu.name for gpu in gpus.devices if gpu.capability < BF16_CAPABILITY]
    if lacking:
        rule = f"training on CUDA computes in bf16, which needs compute capability {_dotted(BF16_CAPABILITY)}"
        return problem("bf16", f"{', '.join(lacking)} without bf16; {rule}", "take another GPU, or hide this one: CUDA_VISIBLE_DEVICES=")
    wrong = [f"{gpu.name}: {gpu.error}" for gpu in gpus.devices if gpu.error]
    if wrong:
        return problem("bf16", f"a product failed on {'; '.join(wrong)}", "mend what the check cuda says")
    return ok("bf16", "a product was computed on each device")


def gpu_memory(gpus: Gpus) -> Finding:
    """Free memory of each device."""
    check = "gpu memory"
    if not gpus.devices:
        return ok(check, NO_GPU)
    found = ", ".join(f"{(gpu.free_bytes or 0) / GIB:.1f} of {gpu.total_bytes / GIB:.1f} GiB free" for gpu in gpus.devices)
    if any((gpu.free_bytes or 0) < min(MIN_FREE_BYTES, gpu.total_bytes / 2) for gpu in gpus.devices):
        cure = "end the processes that nvidia-smi shows, or lower --stream.tokens-per-batch"
        return warning(check, found, cure)
    return ok(check, found)


def nccl(gpus: Gpus) -> Finding:
    """Whether NCCL, which joins ranks on GPUs, sums on one of them."""
    if not gpus.devices:
        return ok("nccl", f"{NO_GPU}; ranks on the CPU use gloo")
    try:
        return ok("nccl", f"{probe('nccl')['version']}, sums on one GPU")
    except ProbeError as error:
        cure = (
            "NCCL_DEBUG=INFO gbla-rec train shows its reason; usual: a wrong NCCL_SOCKET_IFNAME, a small /dev/shm, a torch built without it"
        )
        return problem("nccl", str(error), cure)


def triton_cache(gpus: Gpus) -> Finding:
    """Whether compiled kernels can be kept; without a GPU nothing is compiled."""
    directory = triton_cache_dir()
    try:
        try_directory(directory)
    except OSError as error:
        report = problem if gpus.devices else warning
        found = f"{directory} cannot be written: {error.strerror}{'' if gpus.devices else ' (needed with a GPU only)'}"
        return report("triton cache", found, write_cure(error, "TRITON_CACHE_DIR"))
    return ok("triton cache", f"{directory} is writable")


def triton_cache_dir() -> Path:
    """Where Triton keeps compiled kernels."""
    given = os.environ.get("TRITON_CACHE_DIR")
    return Path(given) if given else Path(os.environ.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache")


def compiler(gpus: Gpus) -> Finding:
    """Whether the C compiler that Triton would call can compile against Python.h: each kernel gets a launcher in C."""
    check = "c compiler"
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if not gpus.devices:
        return ok(check, f"{found or 'none'}; needed with a GPU only")
    cure = "install gcc and Python's headers (apt-get install gcc libc6-dev python3-dev), or set CC to a compiler"
    if found is None:
        return problem(check, "neither gcc nor clang is on PATH; Triton compiles a launcher in C for each kernel", cure)
    command = [found, f"-I{_include_dir()}", "-fsyntax-only", "-x", "c", "-"]
    try:
        tried = subprocess.run(command, input="#include <Python.h>\n", capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return problem(check, f"{found} does not run: {error}", cure)
    if tried.returncode:
        return problem(check, f"{found} cannot compile against Python.h: {(tried.stderr.splitlines() or ['no message'])[0]}", cure)
    return ok(check, f"{found} compiles against Python.h")


def _include_dir() -> str:
    # Debian's default scheme names a directory without headers; Triton takes this one too
    scheme = sysconfig.get_default_scheme()
    return sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
