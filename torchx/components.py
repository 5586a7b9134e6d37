"""TorchX components: how many processes of gbla-rec run where. One self-contained file, because TorchX executes its text.

Run from the repository root with the environment's ``bin`` on PATH; what follows ``--`` goes to the app::

    torchx run -s local_cwd torchx/components.py:prepare -- --recipe movielens_small
    torchx run -s local_cwd torchx/components.py:train -j 1x2 -- --recipe movielens_small
    torchx run -s slurm torchx/components.py:train -j 4x8 -h aws_p5.48xlarge --memMB 0 -- --recipe own_data

``train`` and ``evaluate`` run under torchrun, ``benchmark`` too where -j asks for ranks, the others are one process; docs/launching.md
tells the rest.
"""

import re
import shlex
from dataclasses import replace
from typing import Any, Dict, List, Optional

import torchx.specs as specs
from torchx.specs.finder import ComponentValidationException

BENCHMARKS = (
    "causal_conv1d",
    "cold_start",
    "data_stream",
    "evaluation_ranks",
    "gbla_layer",
    "kernel_counters",
    "kernel_resources",
    "linear_attention",
    "multi_gpu_tests",
    "op_parts",
    "prepare",
    "semantic_ids",
    "softmax_attention",
    "training_step",
)
"""What ``benchmark`` takes: the programs among the files of benchmarks/, which may lie in the image alone."""
EFA_DEVICE = "vpc.amazonaws.com/efa"
NCCL_ENVIRONMENT = {"NCCL_DEBUG": "WARN"}
# the plugin chooses EFA and its RDMA by itself since 1.7 (aws/aws-ofi-nccl, doc/efa-env-var.md): older variables stay unset
# data workers and Triton's compiler fork, which fails once huge pages run out
EFA_ENVIRONMENT = {"FI_EFA_USE_HUGE_PAGE": "0"}


class ArgumentError(ComponentValidationException, ValueError):  # type: ignore[misc]
    """An argument that is refused: TorchX shows this one as a line, without a traceback."""


def prepare(
    *args: str,
    image: str = "gbla-rec",
    name: str = "gbla-rec-prepare",
    h: Optional[str] = None,
    cpu: int = -1,
    memMB: int = -1,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Turns an event log into a prepared dataset (gbla_apps.prepare, one process).

    Args:
        args: what gbla_apps.prepare gets, after "--"
        image: container image that has gbla-rec installed; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_m5.2xlarge
        cpu: processor cores; -1: those of h, or 8 without h
        memMB: memory in MB, 0 to ask for none; -1: that of h, or 32768 without h
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
    """
    resource = _resource(h, cpu, -1, memMB, specs.Resource(cpu=8, gpu=0, memMB=32768))
    return _one_process("prepare", ["-m", "gbla_apps.prepare"], args, image, name, resource, env, mounts, max_retries)


def tokenize(
    *args: str,
    image: str = "gbla-rec",
    name: str = "gbla-rec-tokenize",
    h: Optional[str] = None,
    cpu: int = -1,
    memMB: int = -1,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
) -> specs.AppDef:
    """Gives the items of a prepared dataset their semantic IDs (gbla_apps.tokenize, one process).

    Args:
        args: what gbla_apps.tokenize gets, after "--"
        image: container image that has gbla-rec installed; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_m5.2xlarge
        cpu: processor cores; -1: those of h, or 8 without h
        memMB: memory in MB, 0 to ask for none; -1: that of h, or 32768 without h
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
    """
    resource = _resource(h, cpu, -1, memMB, specs.Resource(cpu=8, gpu=0, memMB=32768))
    return _one_process("tokenize", ["-m", "gbla_apps.tokenize"], args, image, name, resource, env, mounts, max_retries)


def train(
    *args: str,
    j: str = "1x1",
    image: str = "gbla-rec",
    name: str = "gbla-rec-train",
    h: Optional[str] = None,
    cpu: int = -1,
    gpu: int = -1,
    memMB: int = -1,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    metrics_port: int = 0,
) -> specs.AppDef:
    """Trains a recipe on NNODES x NPROC ranks (gbla_apps.train under torchrun).

    Args:
        args: what gbla_apps.train gets, after "--"; with retries or restarts pass --resume, so that they go on
        j: [MIN_NNODES:]NNODESxNPROC, e.g. 4x8; with MIN_NNODES torchrun starts on fewer nodes when some are missing
        image: container image that has gbla-rec installed; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_p5.48xlarge
        cpu: processor cores of a node; -1: those of h, or 2 without h
        gpu: GPUs of a node; -1: those of h, or 0 without h
        memMB: memory of a node in MB, 0 to ask for none; -1: that of h, or 4096 without h
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
        max_restarts: how often torchrun restarts the processes of a job in which one failed
        rdzv_port: port of the first node on which several nodes meet
        metrics_port: port of each node on which its first process serves metrics for Prometheus; 0: none
    """
    resource = _resource(h, cpu, gpu, memMB, specs.Resource(cpu=2, gpu=0, memMB=4096))
    app = _spmd("train", ["-m", "gbla_apps.train"], args, j, image, name, resource, env, mounts, max_retries, max_restarts, rdzv_port)
    if not 0 <= metrics_port < 65536 or metrics_port == rdzv_port:
        raise ArgumentError(f"metrics_port must be a port other than rdzv_port ({rdzv_port}), or 0 for none, got {metrics_port}")
    if metrics_port:
        (role,) = app.roles
        role.port_map["metrics"] = metrics_port
        role.env["GBLA_REC_METRICS_PORT"] = str(metrics_port)
    return app


def evaluate(
    *args: str,
    j: str = "1x1",
    image: str = "gbla-rec",
    name: str = "gbla-rec-evaluate",
    h: Optional[str] = None,
    cpu: int = -1,
    gpu: int = -1,
    memMB: int = -1,
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
        h: a named resource, e.g. aws_p5.48xlarge
        cpu: processor cores of a node; -1: those of h, or 2 without h
        gpu: GPUs of a node; -1: those of h, or 0 without h
        memMB: memory of a node in MB, 0 to ask for none; -1: that of h, or 4096 without h
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
        rdzv_port: port of the first node on which several nodes meet
    """
    resource = _resource(h, cpu, gpu, memMB, specs.Resource(cpu=2, gpu=0, memMB=4096))
    target = ["-m", "gbla_apps.evaluate"]
    return _spmd("evaluate", target, args, j, image, name, resource, env, mounts, max_retries, 0, rdzv_port)


def benchmark(
    *args: str,
    script: str,
    j: str = "",
    image: str = "gbla-rec",
    name: str = "gbla-rec-benchmark",
    h: Optional[str] = None,
    cpu: int = -1,
    gpu: int = -1,
    memMB: int = -1,
    env: Optional[Dict[str, str]] = None,
    mounts: Optional[List[str]] = None,
    max_retries: int = 0,
    rdzv_port: int = 29500,
) -> specs.AppDef:
    """Runs one benchmark of benchmarks/ (one process, or ranks under torchrun, in the root of the repository or of the image).

    Args:
        args: what the benchmark gets, after "--"
        script: its name, e.g. gbla_layer for benchmarks/gbla_layer.py
        j: NNODESxNPROC for a benchmark of several ranks (training_step), e.g. 1x8; without it one process, not under torchrun
        image: container image that has gbla-rec and benchmarks/; ignored by the schedulers local_cwd and slurm
        name: name of the job
        h: a named resource, e.g. aws_p5.48xlarge
        cpu: processor cores; -1: those of h, or 8 without h
        gpu: GPUs; -1: those of h, or 1 without h
        memMB: memory in MB, 0 to ask for none; -1: that of h, or 65536 without h
        env: environment variables, NAME=value,...
        mounts: mounts of the container, type=bind,src=/host,dst=/job[,readonly],...
        max_retries: how often the scheduler starts a failed job again
        rdzv_port: port of the first node on which several nodes meet
    """
    if script not in BENCHMARKS:
        known = ", ".join(BENCHMARKS)
        raise ArgumentError(f"script must be the name of a program of benchmarks/ without .py, one of {known}, got {script!r}")
    resource = _resource(h, cpu, gpu, memMB, specs.Resource(cpu=8, gpu=1, memMB=65536))
    target = [f"benchmarks/{script}.py"]
    if j:
        return _spmd("benchmark", target, args, j, image, name, resource, env, mounts, max_retries, 0, rdzv_port)
    return _one_process("benchmark", target, args, image, name, resource, env, mounts, max_retries)


def _resource(h: Optional[str], cpu: int, gpu: int, memMB: int, default: specs.Resource) -> specs.Resource:
    """The named resource, or ``default``, with what the caller gave in its place: nodes offer less than the machine has."""
    given = {"cpu": cpu, "gpu": gpu, "memMB": memMB}
    for key, value in given.items():
        if value < -1:
            raise ArgumentError(f"{key} must not be negative, or -1 for that of h or the default, got {value}")
    try:
        named = specs.resource(h=h) if h else default
    except KeyError as error:
        raise ArgumentError(f"h must be a named resource, got {h!r}: {error.args[0]}") from error
    # -1 and not None: TorchX hands over the value of an Optional[int] as text
    return replace(named, **{key: value for key, value in given.items() if value >= 0})


def _mounts(mounts: Optional[List[str]]) -> List[Any]:
    try:
        return specs.parse_mounts(mounts) if mounts else []
    except (KeyError, ValueError) as error:
        forms = "type=bind,src=/host,dst=/job[,readonly] or type=volume,src=CLAIM,dst=/job, one after the other"
        raise ArgumentError(f"mounts must be {forms}, got {','.join(mounts or [])!r}, at fault: {error.args[0]}") from error


def _require_not_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ArgumentError(f"{name} must not be negative, got {number}")


def _one_process(
    role_name: str,
    target: List[str],
    args: tuple[str, ...],
    image: str,
    name: str,
    resource: specs.Resource,
    env: Optional[Dict[str, str]],
    mounts: Optional[List[str]],
    max_retries: int,
) -> specs.AppDef:
    _require_not_negative(max_retries=max_retries)
    role = specs.Role(
        name=role_name,
        image=image,
        entrypoint="python",
        args=[*target, *_app_args(args)],
        env=_environment(resource, 1) | (env or {}),
        max_retries=max_retries,
        resource=resource,
        mounts=_mounts(mounts),
    )
    return specs.AppDef(name=name, roles=[role])


def _spmd(
    role_name: str,
    target: List[str],
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
        raise ArgumentError(f"j must be [MIN_NNODES:]NNODESxNPROC with 1 <= MIN_NNODES <= NNODES, e.g. 1x2, got {j!r}")
    _require_not_negative(max_retries=max_retries, max_restarts=max_restarts)
    if not 0 < rdzv_port < 65536:
        raise ArgumentError(f"rdzv_port must be a port, 1 to 65535, got {rdzv_port}")
    num_nodes, num_processes = int(shape[2]), int(shape[3])
    if resource.gpu > 0 and num_processes > resource.gpu:
        cure = "lower NPROC or raise --gpu"
        raise ArgumentError(f"j must not ask for more processes than GPUs on a node, got {j!r} and gpu={resource.gpu}; {cure}")
    # the scheduler names the first node in a variable, which only the shell on the node can read: the one part not quoted
    meeting_point = "localhost:0" if num_nodes == 1 else f"$${{{specs.macros.rank0_env}:=localhost}}:{rdzv_port}"
    launcher = ["--rdzv-backend", "c10d", "--rdzv-id", specs.macros.app_id, "--nnodes", j.split("x")[0]]
    launcher += ["--nproc-per-node", str(num_processes), "--max-restarts", str(max_restarts), "--tee", "3", *target]
    # exec: a scheduler's SIGTERM must reach torchrun, not a shell
    command = f"exec python -m torch.distributed.run --rdzv-endpoint {meeting_point} {shlex.join(launcher)} {shlex.join(_app_args(args))}"
    role = specs.Role(
        name=role_name,
        image=image,
        min_replicas=int(shape[1]) if shape[1] else None,
        num_replicas=num_nodes,
        entrypoint="bash",
        args=["-c", command.rstrip()],
        env=_environment(resource, num_processes) | (env or {}),
        port_map={"c10d": rdzv_port},
        max_retries=max_retries,
        resource=resource,
        mounts=_mounts(mounts),
    )
    return specs.AppDef(name=name, roles=[role])


def _app_args(args: tuple[str, ...]) -> List[str]:
    # TorchX fills in macros (${app_id}) and takes $$ for $
    return [arg.replace("$", "$$") for arg in (args[1:] if args[:1] == ("--",) else args)]


def _environment(resource: specs.Resource, num_processes: int) -> Dict[str, str]:
    environment = {
        # with a GPU the CPU launches and collates, which threads make no faster; the pools of several processes slow each other
        "OMP_NUM_THREADS": "1" if resource.gpu > 0 else str(max(1, resource.cpu // num_processes)),
        # a restart meets in a store of its own: in torchrun's shared one it finds the addresses of dead ranks
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    if resource.gpu > 0:
        environment |= NCCL_ENVIRONMENT
    if EFA_DEVICE in resource.devices:
        environment |= EFA_ENVIRONMENT
    return environment
