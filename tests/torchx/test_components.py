"""The components launch the right command, on every scheduler that can be asked without a cluster."""

import ast
import shlex
import sys
from pathlib import Path

import pytest
from torchx.runner import get_runner
from torchx.specs.file_linter import validate

ROOT = Path(__file__).resolve().parents[2]
COMPONENTS = ROOT / "torchx" / "components.py"


def role_of(component, *arguments):
    with get_runner() as runner:
        info = runner.dryrun_component(f"{COMPONENTS}:{component}", list(arguments), "local_cwd")
        (role,) = info._app.roles
        return role


def command_of(component, *arguments):
    role = role_of(component, *arguments)
    assert role.entrypoint == "bash" and role.args[0] == "-c"
    return shlex.split(role.args[1])


def option(command, name):
    return command[command.index(name) + 1]


@pytest.mark.parametrize("component", ["train", "evaluate"])
def test_one_node_runs_torchrun_on_the_app_and_passes_the_arguments(component):
    command = command_of(component, "-j", "1x2", "--", "--recipe", "movielens_small", "--name", "a b'c")
    assert command[:3] == ["python", "-m", "torch.distributed.run"]
    assert (option(command, "--nnodes"), option(command, "--nproc-per-node")) == ("1", "2")
    assert (option(command, "--rdzv-backend"), option(command, "--rdzv-endpoint")) == ("c10d", "localhost:0")
    assert command[-6:] == ["-m", f"gbla_apps.{component}", "--recipe", "movielens_small", "--name", "a b'c"]


def test_several_nodes_meet_on_the_first_one():
    role = role_of("train", "-j", "2:4x8", "--gpu", "8", "--rdzv_port", "29512", "--max_restarts", "3")
    assert (role.num_replicas, role.min_replicas, role.resource.gpu) == (4, 2, 8)
    assert "--rdzv-endpoint $${TORCHX_RANK0_HOST:=localhost}:29512 " in role.args[1].replace("${rank0_env}", "TORCHX_RANK0_HOST")
    assert "--nnodes 2:4 --nproc-per-node 8 --max-restarts 3" in role.args[1]
    assert role.port_map == {"c10d": 29512}


def test_resources_environment_mounts_and_retries_reach_the_scheduler():
    role = role_of(
        "train",
        "-j",
        "1x8",
        "-h",
        "aws_p5.48xlarge",
        "--env",
        "NCCL_DEBUG=INFO",
        "--max_retries",
        "2",
        "--mounts",
        "type=bind,src=/data,dst=/job",
    )
    assert role.resource.gpu == 8
    assert role.env["NCCL_DEBUG"] == "INFO" and int(role.env["OMP_NUM_THREADS"]) >= 1
    assert role.max_retries == 2
    assert [(mount.src_path, mount.dst_path) for mount in role.mounts] == [("/data", "/job")]


@pytest.mark.parametrize("j", ["2", "0x2", "1x0", "3:2x1", "0:2x1", "1x2x3", "x", "1x-1"])
def test_a_malformed_job_size_is_refused(j):
    with pytest.raises(ValueError, match=r"NNODESxNPROC"):
        role_of("train", f"-j={j}")


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(ValueError, match="more processes than GPUs"):
        role_of("train", "-j", "1x4", "--gpu", "2")


@pytest.mark.parametrize(
    ("scheduler", "options", "client"),
    [("slurm", {}, "torchx"), ("kubernetes", {"queue": "q"}, "kubernetes"), ("aws_batch", {"queue": "q"}, "torchx")],
)
def test_cluster_schedulers_accept_the_job_without_a_cluster(scheduler, options, client):
    pytest.importorskip(client, reason=f"pip install 'torchx[{scheduler}]==0.7.0' brings it")
    with get_runner() as runner:
        request = str(runner.dryrun_component(f"{COMPONENTS}:train", ["-j", "2x8", "-h", "aws_p5.48xlarge"], scheduler, cfg=options))
    assert "gbla_apps.train" in request


def test_the_file_is_self_contained_and_passes_the_linter_of_torchx():
    tree = ast.parse(COMPONENTS.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    roots = {name.partition(".")[0] for name in imported | {node.module for node in froms}}
    assert roots <= {"torchx"} | sys.stdlib_module_names
    assert not any(isinstance(node, ast.Name) and node.id == "__file__" for node in ast.walk(tree))
    assert [validate(str(COMPONENTS), name) for name in ("train", "evaluate")] == [[], []]
