"""The far side of a probe: ``python -m gbla_rec.doctor.probe_process NAME [ARGUMENT ...]`` prints what a function found, as JSON."""

import importlib
import json
import os
import sys
from datetime import timedelta
from typing import Any

RAGGED_LENGTHS = [2, 0, 3]


def import_package(name: str) -> dict[str, Any]:
    """Import a package by name."""
    module = importlib.import_module(name)
    return {"file": getattr(module, "__file__", None)}


def jagged_operators(device: str) -> dict[str, Any]:
    """Pad a small jagged batch with fbgemm's operators on ``device``."""
    import torch

    importlib.import_module("fbgemm_gpu")
    offsets = torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor(RAGGED_LENGTHS, device=device))
    values = torch.arange(1.0, 6.0, device=device)[:, None]
    dense = torch.ops.fbgemm.jagged_to_padded_dense(values, [offsets], [3], 0.0)[..., 0].tolist()
    if dense != [[1, 2, 0], [0, 0, 0], [3, 4, 5]]:
        raise RuntimeError(f"jagged_to_padded_dense on {device} must give [[1, 2, 0], [0, 0, 0], [3, 4, 5]], got {dense}")
    return {}


def gpus() -> dict[str, Any]:
    """What torch was built for, and each CUDA device that it sees."""
    import torch

    found: dict[str, Any] = {"built_for": torch.version.cuda, "error": None, "devices": []}
    if torch.version.cuda is None:
        return found
    try:
        torch.cuda.init()
    except Exception as error:
        found["error"] = one_line(error)
        return found
    found["devices"] = [_gpu(index) for index in range(torch.cuda.device_count())]
    return found


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    found = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "shared_memory_bytes": getattr(properties, "shared_memory_per_block_optin", None),
        "total_bytes": properties.total_memory,
        "free_bytes": None,
        "error": None,
    }
    try:
        found["free_bytes"] = torch.cuda.mem_get_info(index)[0]
        square = torch.ones(16, 16, device=f"cuda:{index}", dtype=torch.bfloat16)
        if (square @ square).sum().item() != 16**3:
            raise RuntimeError("a bf16 product of ones is wrong")
    except Exception as error:
        found["error"] = one_line(error)
    return found


def nccl() -> dict[str, Any]:
    """Sum over an NCCL group of one rank."""
    import torch
    import torch.distributed as dist

    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=60))
    value = torch.ones(1, device="cuda")
    dist.all_reduce(value)
    if value.item() != 1:
        raise RuntimeError(f"the sum over one rank must be 1, got {value.item()}")
    return {"version": ".".join(map(str, torch.cuda.nccl.version()))}


def gloo(rank: str, world_size: str, store: str, timeout_s: str) -> dict[str, Any]:
    """Sum 1 over the ranks of a gloo group that meet in the file ``store``."""
    import torch
    import torch.distributed as dist

    ranks = int(world_size)
    timeout = timedelta(seconds=float(timeout_s))
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=int(rank), world_size=ranks, timeout=timeout)
    value = torch.ones(1)
    dist.all_reduce(value)
    if value.item() != ranks:
        raise RuntimeError(f"the sum of 1 over {ranks} ranks must be {ranks}, got {value.item()}")
    return {}


PROBES = {function.__name__: function for function in (import_package, jagged_operators, gpus, nccl, gloo)}


def one_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__


def main() -> None:
    """Run the probe that the command line names."""
    try:
        result = PROBES[sys.argv[1]](*sys.argv[2:])
    except BaseException as error:
        # SystemExit too: a library that ends the process on import is what is looked for
        result = {"raised": one_line(error)}
    print(f"\n{json.dumps(result)}", flush=True)
    # not sys.exit: a process group with a dead peer may wait on the way out
    os._exit(0)


if __name__ == "__main__":
    main()
