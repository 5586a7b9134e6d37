"""TorchX components: how many processes of gbla-rec run where. One self-contained file, because TorchX executes its text.

Run from the repository root with the environment's ``bin`` on PATH; what follows ``--`` goes to the app::

    torchx run -s local_cwd torchx/components.py:train -j 1x2 -- --recipe movielens_small
    torchx run -s slurm torchx/components.py:train -j 4x8 -h aws_p5.48xlarge -- --recipe own_data
"""

import re
import shlex
from typing import Dict, List, Optional

import torchx.specs as specs


def train(
    *args: str,
    j: str = "1x1",
    image: str = "gbla-rec",
    name: str = "gbla-rec-train",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Trains a recipe on NNODES x NPROC ranks (gbla_apps.train under torchrun).

    Args:
        args: what gbla_apps.train gets, after "--"; with retries or restarts pass --resume, so that they go on
        j: [MIN_NNODES:]NNODESxNPROC, e.g. 4x8; with MIN_NNODES torchrun starts on fewer nodes when some are missing
        image: container image that has gbla-rec installed; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_p5.48xlarge; replaces cpu, gpu and memMB
        cpu: processor cores of a node
        gpu: GPUs of a node
        memMB: memory of a node in MB
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
        max_restarts: how often torchrun restarts the processes of a job in which one failed
        rdzv_port: port of the first node on which several nodes meet
    """
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _gbla_rec_spmd("gbla_apps.train", args, j, image, name, resource, env, mounts, max_retries, max_restarts, rdzv_port)


def evaluate(
    *args: str,
    j: str = "1x1",
    image: str = "gbla-rec",
    name: str = "gbla-rec-evaluate",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 4096,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Evaluates a trained run on NNODES x NPROC ranks (gbla_apps.evaluate under torchrun).

    Args:
        args: what gbla_apps.evaluate gets, after "--"
        j: NNODESxNPROC, e.g. 1x8; need not be that of the training
        image: container image that has gbla-rec installed; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_p5.48xlarge; replaces cpu, gpu and memMB
        cpu: processor cores of a node
        gpu: GPUs of a node
        memMB: memory of a node in MB
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
        rdzv_port: port of the first node on which several nodes meet
    """
    resource = specs.resource(cpu=cpu, gpu=gpu, memMB=memMB, h=h)
    return _gbla_rec_spmd("gbla_apps.evaluate", args, j, image, name, resource, env, mounts, max_retries, 0, rdzv_port)


def _gbla_rec_spmd(
    module: str,
    args: tuple[str, ...],
    j: str,
    image: str,
    name: str,
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    max_retries: int,
    max_restarts: int,
    rdzv_port: int,
) -> specs.AppDef:
    shape = re.fullmatch(r"(?:(\d+):)?([1-9]\d*)x([1-9]\d*)", j)
    if shape is None or not 1 <= int(shape[1] or 1) <= int(shape[2]):
        raise ValueError(f"j must be [MIN_NNODES:]NNODESxNPROC with 1 <= MIN_NNODES <= NNODES, e.g. 1x2, got {j!r}")
    num_nodes, num_processes = int(shape[2]), int(shape[3])
    if resource.gpu > 0 and num_processes > resource.gpu:
        raise ValueError(f"j must not ask for more processes than GPUs on a node, got {j!r} and gpu={resource.gpu}; lower NPROC")
    # the scheduler names the first node in a variable, which only the shell on the node can read: the one part not quoted
    meeting_point = "localhost:0" if num_nodes == 1 else f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    launcher = [
        "--rdzv-backend",
        "c10d",
        "--rdzv-id",
        specs.macros.app_id,
        "--nnodes",
        j.split("x")[0],
        "--nproc-per-node",
        str(num_processes),
    ]
    launcher += ["--max-restarts", str(max_restarts), "--tee", "3", "-m", module]
    app_args = args[1:] if args[:1] == ("--",) else args
    command = f"python -m torch.distributed.run --rdzv-endpoint {meeting_point} {shlex.join(launcher)} {shlex.join(app_args)}"
    threads = max(1, resource.cpu // num_processes)
    role = specs.Role(
        name=module.rpartition(".")[2],
        image=image,
        min_replicas=int(shape[1]) if shape[1] else None,
        num_replicas=num_nodes,
        entrypoint="bash",
        args=["-c", command.rstrip()],
        env={"OMP_NUM_THREADS": str(threads)} | (env or {}),
        port_map={"c10d": rdzv_port},
        max_retries=max_retries,
        resource=resource,
        mounts=specs.parse_mounts(mounts) if mounts else [],
    )
    return specs.AppDef(name=name, roles=[role])
