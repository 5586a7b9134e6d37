"""All checks, in the order of the report."""

from concurrent.futures import ThreadPoolExecutor

from gbla_rec.doctor import gpu, packages, storage
from gbla_rec.doctor.finding import Finding, Status, warning
from gbla_rec.doctor.gloo import gloo

PARALLEL_PROBES = 4
NEEDS_TORCH = ("import torchrec", "fbgemm on cpu", "gloo", "cuda", "nccl", "gpu architecture", "bf16", "gpu memory")


def examine() -> list[Finding]:
    """Run every check; takes about as long as importing torch a few times. Nothing is left on disk."""
    return [*version_checks(), *library_checks(), *storage_checks()]


def version_checks() -> list[Finding]:
    """What is installed."""
    return [
        packages.own_version(),
        packages.python_version(),
        packages.package_version("torch"),
        packages.package_version("torchrec"),
        packages.fbgemm_version(),
        packages.package_version("triton"),
        packages.package_version("numpy"),
        packages.torchx_version(),
        packages.other_packages(),
        packages.pairing(),
    ]


def library_checks() -> list[Finding]:
    """What loads and computes; if torch does not, what needs it is not tried."""
    torch = packages.package_import("torch")
    if torch.status is Status.PROBLEM:
        triton, no_gpus = packages.package_import("triton"), gpu.Gpus(built_for=None, error=None, devices=())
        return [torch, triton, *map(_not_checked, NEEDS_TORCH), gpu.compiler(no_gpus), gpu.triton_cache(no_gpus)]
    with ThreadPoolExecutor(PARALLEL_PROBES) as pool:
        running = [
            pool.submit(packages.package_import, "triton"),
            pool.submit(packages.package_import, "torchrec"),
            pool.submit(packages.fbgemm_operators, "cpu"),
            pool.submit(gloo),
        ]
        # one after the other: a GPU in exclusive mode admits one process
        gpus = gpu.visible_gpus()
        on_gpu = [packages.fbgemm_operators("cuda")] if gpus.devices else []
        on_gpu += [
            gpu.cuda(gpus, gpu.listed_gpus()),
            gpu.nccl(gpus),
            gpu.architecture(gpus),
            gpu.ragged_attention(gpus),
            gpu.bf16(gpus),
            gpu.gpu_memory(gpus),
        ]
        on_any = [future.result() for future in running]
    return [torch, *on_any, *on_gpu, gpu.compiler(gpus), gpu.triton_cache(gpus)]


def storage_checks() -> list[Finding]:
    """Where runs are saved, and what limits processes."""
    return [storage.workspace_writable(), storage.free_space(), storage.shared_memory(), storage.open_files()]


def _not_checked(check: str) -> Finding:
    return warning(check, "not checked, since torch cannot be imported", "mend the check `import torch`, then run gbla-rec doctor again")
