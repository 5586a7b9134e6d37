"""The components launch the right command, on every scheduler that can be asked without a cluster."""

import ast
import importlib.util
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from torchx import specs
from torchx.cli.main import main as torchx_main
from torchx.runner import get_runner
from torchx.specs.file_linter import validate

from gbla_rec.training.metrics_endpoint import PORT_VARIABLE

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


COMPONENT_NAMES = ("prepare", "tokenize", "train", "evaluate", "benchmark")


@pytest.mark.parametrize("component", ["train", "evaluate"])
def test_one_node_runs_torchrun_on_the_app_and_passes_the_arguments(component):
    command = command_of(component, "-j", "1x2", "--", "--recipe", "movielens_small", "--name", "a b'c")
    # exec: no shell stands between torchrun and the scheduler's SIGTERM
    assert command[:4] == ["exec", "python", "-m", "torch.distributed.run"]
    assert (option(command, "--nnodes"), option(command, "--nproc-per-node")) == ("1", "2")
    assert (option(command, "--rdzv-backend"), option(command, "--rdzv-endpoint")) == ("c10d", "localhost:0")
    assert command[-6:] == ["-m", f"gbla_apps.{component}", "--recipe", "movielens_small", "--name", "a b'c"]


@pytest.mark.parametrize("component", ["train", "tokenize"])
def test_dollars_of_an_argument_reach_the_app(component):
    given = ["a$$b", "${app_id}", "$HOME"]
    macros = specs.macros.Values(img_root="root", app_id="app", replica_id="0", rank0_env="RANK0")
    role = macros.apply(role_of(component, "--", *given))
    assert (shlex.split(role.args[1]) if component == "train" else role.args)[-3:] == given


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


@pytest.mark.parametrize("component", ["prepare", "tokenize"])
def test_data_steps_are_one_process_with_the_arguments_as_given(component):
    role = role_of(component, "--", "--recipe", "movielens_small", "--name", "a b'c")
    assert (role.name, role.num_replicas, role.resource.gpu) == (component, 1, 0)
    assert [role.entrypoint, *role.args] == ["python", "-m", f"gbla_apps.{component}", "--recipe", "movielens_small", "--name", "a b'c"]
    assert importlib.util.find_spec(f"gbla_apps.{component}") is not None


def test_a_benchmark_is_a_file_of_the_repository_on_one_gpu():
    role = role_of("benchmark", "--script", "gbla_layer", "--", "--quick")
    assert [role.entrypoint, *role.args] == ["python", "benchmarks/gbla_layer.py", "--quick"]
    assert (role.name, role.num_replicas, role.resource.gpu) == ("benchmark", 1, 1)
    assert (ROOT / role.args[0]).exists()


def test_a_benchmark_of_several_ranks_runs_under_torchrun():
    script = ["--script", "training_step", "-j", "2x8", "-h", "aws_p5.48xlarge"]
    role = role_of("benchmark", *script, "--rdzv_port", "29512", "--", "--history-lengths", "zipf")
    assert (role.name, role.num_replicas, role.resource.gpu, role.port_map) == ("benchmark", 2, 8, {"c10d": 29512})
    command = shlex.split(role.args[1])
    assert (option(command, "--nnodes"), option(command, "--nproc-per-node")) == ("2", "8")
    assert command[-3:] == ["benchmarks/training_step.py", "--history-lengths", "zipf"] and "-m" not in command[4:]
    with pytest.raises(ValueError, match="got '1x2' and gpu=1; lower NPROC or raise --gpu"):
        role_of("benchmark", "--script", "training_step", "-j", "1x2")


@pytest.mark.parametrize("script", ["../train", "gbla_layer.py", "", "a b", "nosuch", "gpu_timing"])
def test_what_is_no_program_of_benchmarks_is_refused_with_those_that_are(script):
    with pytest.raises(ValueError, match=f"program of benchmarks/ .*, one of .*cold_start, .*gbla_layer.*, got {script!r}"):
        role_of("benchmark", f"--script={script}")


def test_every_program_of_benchmarks_is_known_to_the_component():
    components = runpy.run_path(str(COMPONENTS))
    programs = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert set(components["BENCHMARKS"]) == programs


@pytest.mark.parametrize("component", COMPONENT_NAMES)
def test_what_is_given_replaces_that_of_the_named_resource_alone(component):
    script = ["--script", "gbla_layer"] if component == "benchmark" else []
    named, replaced = (
        role_of(component, *script, "-h", "aws_p5.48xlarge", *given).resource for given in ([], ["--cpu", "90", "--memMB", "0"])
    )
    assert named.cpu == 192 and named.memMB > 10**6
    assert (replaced.cpu, replaced.memMB) == (90, 0)
    assert (replaced.gpu, replaced.devices, replaced.capabilities) == (named.gpu, named.devices, named.capabilities)


def test_the_metrics_port_is_opened_and_told_to_the_app():
    role = role_of("train", "--metrics_port", "9100")
    assert role.port_map["metrics"] == 9100 and role.env[PORT_VARIABLE] == "9100"
    assert "metrics" not in role_of("train").port_map and PORT_VARIABLE not in role_of("train").env
    for port in ("29500", "-1", "65536"):
        with pytest.raises(ValueError, match="metrics_port must be a port other than rdzv_port"):
            role_of("train", f"--metrics_port={port}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rdzv_port", "0"], "rdzv_port must be a port, 1 to 65535, got 0"),
        (["--rdzv_port", "65536"], "rdzv_port must be a port, 1 to 65535, got 65536"),
        (["--max_retries=-1"], "max_retries must not be negative, got -1"),
        (["--max_restarts=-1"], "max_restarts must not be negative, got -1"),
        (["--cpu=-2"], "cpu must not be negative, or -1 for that of h or the default, got -2"),
        (["-h", "nowhere"], "h must be a named resource, got 'nowhere': .*aws_p5.48xlarge"),
        (["--mounts", "type=bind,src=/x"], "mounts must be .*, got 'type=bind,src=/x', at fault: dst"),
        (["--mounts", "type=tape,src=/x,dst=/y"], "mounts must be .*, got 'type=tape,src=/x,dst=/y', at fault: .*tape"),
        (["--mounts", "src=/x"], "mounts must be .*, got 'src=/x', at fault: type must be specified first"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule(arguments, message):
    with pytest.raises(ValueError, match=message):
        role_of("train", *arguments)


def test_data_steps_refuse_a_negative_number_of_retries_too():
    with pytest.raises(ValueError, match="max_retries must not be negative, got -1"):
        role_of("prepare", "--max_retries=-1")


def test_a_wrong_argument_ends_torchx_with_a_line_and_no_traceback(caplog):
    with pytest.raises(SystemExit) as ended:
        torchx_main(["run", "-s", "local_cwd", "--dryrun", f"{COMPONENTS}:train", "-j", "0x1"])
    assert ended.value.code == 1 and "j must be [MIN_NNODES:]NNODESxNPROC" in caplog.text and "Traceback" not in caplog.text


def test_network_variables_follow_the_devices_and_can_be_replaced():
    assert not {"NCCL_DEBUG", "FI_EFA_USE_HUGE_PAGE"} & set(role_of("train").env)
    assert "FI_EFA_USE_HUGE_PAGE" not in role_of("train", "--gpu", "8").env
    env = role_of("train", "-h", "aws_p5.48xlarge", "--env", "NCCL_DEBUG=INFO,OMP_NUM_THREADS=3").env
    assert (env["FI_EFA_USE_HUGE_PAGE"], env["NCCL_DEBUG"], env["OMP_NUM_THREADS"]) == ("0", "INFO", "3")


@pytest.mark.parametrize(("scheduler", "options"), [("slurm", {}), ("kubernetes", {"queue": "q"}), ("aws_batch", {"queue": "q"})])
@pytest.mark.parametrize("component", COMPONENT_NAMES)
def test_cluster_schedulers_accept_the_job_without_a_cluster(component, scheduler, options):
    arguments = {"train": ["-j", "2x8"], "evaluate": ["-j", "2x8"], "benchmark": ["--script", "gbla_layer"]}.get(component, [])
    with get_runner() as runner:
        request = str(runner.dryrun_component(f"{COMPONENTS}:{component}", [*arguments, "-h", "aws_p5.48xlarge"], scheduler, cfg=options))
    assert ("benchmarks/gbla_layer.py" if component == "benchmark" else f"gbla_apps.{component}") in request


def test_the_file_is_self_contained_and_passes_the_linter_of_torchx():
    tree = ast.parse(COMPONENTS.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    froms = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert all(node.level == 0 for node in froms)
    roots = {name.partition(".")[0] for name in imported | {node.module for node in froms}}
    assert roots <= {"torchx"} | sys.stdlib_module_names
    assert not any(isinstance(node, ast.Name) and node.id == "__file__" for node in ast.walk(tree))
    assert [validate(str(COMPONENTS), name) for name in COMPONENT_NAMES] == [[]] * len(COMPONENT_NAMES)
