"""What clusters get for 16 nodes of 8 H100s, compared with files that a person has read.

After a wanted change write them anew, read the difference, and commit it: ``GBLA_REC_WRITE_GOLDEN=1 pytest tests/torchx/test_golden.py``.
"""

import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from kubernetes.client import ApiClient
from torchx.runner import get_runner

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
WRITE = "GBLA_REC_WRITE_GOLDEN"
NUM_NODES = 16
SLURM = [f"-j={NUM_NODES}x8", "-h=aws_p5.48xlarge", "--cpu=184", "--memMB=1900000", "--metrics_port=9100", "--max_retries=3"]
KUBERNETES = [*SLURM[:-1], "--max_restarts=3", "--image=registry.example/gbla-rec:0.1.0", "--mounts=type=volume,src=fsx,dst=/workspace"]
APP = ["--", "--recipe", "own_data", "--name", "shop", "--dataset", "shop", "--resume"]


def request(scheduler, arguments, **options):
    with get_runner() as runner:
        return runner.dryrun_component(f"{ROOT}/torchx/components.py:train", [*arguments, *APP], scheduler, cfg=options).request


@pytest.fixture(scope="module")
def slurm_script():
    return request("slurm", SLURM, partition="p5", time="3-00:00:00").materialize()


@pytest.fixture(scope="module")
def manifest():
    text = str(request("kubernetes", KUBERNETES, queue="research"))
    # TorchX draws a new suffix for each job
    (job_name,) = set(re.findall(r"gbla-rec-train-[a-z0-9]{10,}", text))
    return yaml.safe_load(text.replace(job_name, "gbla-rec-train-example"))


def tasks(manifest):
    return manifest["spec"]["tasks"]


def pod(task):
    return task["template"]["spec"]


def container(task):
    (only,) = pod(task)["containers"]
    return only


def environment(task):
    return {variable["name"]: variable["value"] for variable in container(task)["env"]}


def assert_golden(name, text):
    path = GOLDEN / name
    if os.environ.get(WRITE):
        path.write_text(text)
    assert path.read_text() == text, f"{path} differs; if that is wanted: {WRITE}=1 pytest {Path(__file__).relative_to(ROOT)}"


def test_slurm_script_is_the_golden_one(slurm_script):
    assert_golden("train_16x8_h100.slurm.sh", slurm_script)


def test_kubernetes_manifest_is_the_golden_one(manifest):
    # of 16 tasks the first two: the next test shows that the others are like the second
    assert_golden("train_16x8_h100.kubernetes.yaml", yaml.dump(manifest | {"spec": manifest["spec"] | {"tasks": tasks(manifest)[:2]}}))


def test_nodes_after_the_first_differ_by_their_number_only(manifest, slurm_script):
    assert len(tasks(manifest)) == NUM_NODES
    for node, task in enumerate(tasks(manifest)[2:], start=2):
        assert json.dumps(task) == json.dumps(tasks(manifest)[1]).replace("train-1", f"train-{node}").replace('"1"', f'"{node}"', 1)
    groups = slurm_script[slurm_script.index("srun ") : slurm_script.index("exitcode")].split(":\\\n")
    assert len(groups) == NUM_NODES
    for node, group in enumerate(groups[2:], start=2):
        assert group.strip() == groups[1].strip().replace("train-1.", f"train-{node}.")


def test_slurm_script_parses_and_asks_for_whole_nodes(slurm_script):
    subprocess.run(["bash", "-n"], input=slurm_script, text=True, check=True, timeout=10)
    options = [line for line in slurm_script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(options) == NUM_NODES and slurm_script.count("#SBATCH hetjob") == NUM_NODES - 1
    for line in options:
        assert {"--gpus-per-task=8", "--cpus-per-task=184", "--mem=1900000", "--ntasks-per-node=1", "--partition=p5"} <= set(line.split())
    assert "TORCHX_MAX_RETRIES=3" in slurm_script


def test_slurm_really_starts_torchrun_with_the_first_node_and_the_job(slurm_script, tmp_path):
    """The script is run; ``srun``, made here, starts its first component as Slurm would."""
    (tmp_path / "srun").write_text(
        '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nargs=()\nfor a; do [[ $a == : ]] && break; args+=("$a"); done\n"${args[@]}"\n'
    )
    (tmp_path / "python").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    for program in ("srun", "python"):
        (tmp_path / program).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST_HET_GROUP_0": "p5-st-1"}
    finished = subprocess.run(["bash"], input=slurm_script, env=variables, capture_output=True, text=True, check=True, timeout=10)
    command = finished.stdout.splitlines()
    assert command[:4] == ["-m", "torch.distributed.run", "--rdzv-endpoint", "p5-st-1:29500"]
    assert command[command.index("--rdzv-id") + 1] == "77"
    assert command[-10:-1] == ["-m", "gbla_apps.train", *APP[1:]]


def test_pods_are_valid_for_kubernetes(manifest):
    for task in tasks(manifest):
        # the client checks required fields and types
        ApiClient().deserialize(SimpleNamespace(data=json.dumps(task["template"])), "V1PodTemplateSpec")
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", task["name"]) and container(task)["name"] == task["name"]
        assert all(isinstance(value, str) for value in environment(task).values())
        assert all(len(port["name"]) <= 15 for port in container(task)["ports"])
        assert pod(task)["restartPolicy"] == "Never"


def test_pods_ask_for_gpus_efa_devices_and_shared_memory(manifest):
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch.volcano.sh/v1alpha1", "Job")
    for task in tasks(manifest):
        limits = container(task)["resources"]["limits"]
        assert (limits["nvidia.com/gpu"], limits["vpc.amazonaws.com/efa"]) == ("8", "32")
        assert (limits["cpu"], limits["memory"]) == ("184000m", "1900000M")
        mounted = {mount["mountPath"]: mount["name"] for mount in container(task)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod(task)["volumes"]}
        assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
        assert volumes[mounted["/workspace"]]["persistentVolumeClaim"] == {"claimName": "fsx"}
        assert pod(task)["nodeSelector"] == {"node.kubernetes.io/instance-type": "p5.48xlarge"}
        assert {port["name"]: port["containerPort"] for port in container(task)["ports"]} == {"c10d": 29500, "metrics": 9100}


def test_nodes_get_the_variables_that_current_efa_software_needs_and_no_others(manifest):
    for task in tasks(manifest):
        found = environment(task)
        assert (found["OMP_NUM_THREADS"], found["NCCL_DEBUG"], found["FI_EFA_USE_HUGE_PAGE"]) == ("1", "WARN", "0")
        # aws-ofi-nccl since 1.7 sets these itself, or is hurt by them
        assert not set(found) & {"FI_PROVIDER", "FI_EFA_USE_DEVICE_RDMA", "FI_EFA_FORK_SAFE", "NCCL_PROTO", "RDMAV_FORK_SAFE"}


def test_pods_meet_at_the_first_one(manifest):
    first, *others = (container(task)["command"][2] for task in tasks(manifest))
    assert "--rdzv-endpoint ${TORCHX_RANK0_HOST:=localhost}:29500 " in first
    # Volcano's plugin env names the pods of the task train-0 so
    assert all("--rdzv-endpoint ${VC_TRAIN_0_HOSTS:=localhost}:29500 " in other for other in others)
    assert set(manifest["spec"]["plugins"]) == {"env", "svc"}
    assert environment(tasks(manifest)[0])["TORCHX_RANK0_HOST"] == "localhost"
