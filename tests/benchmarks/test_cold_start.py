import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
LAUNCHED = """
import json
import sys

import torch

sys.path.insert(0, sys.argv[1])
import cold_start
from gbla_kernels.causal_conv1d import api as conv_api
from gbla_kernels.causal_conv1d import autograd as conv_autograd
from gbla_kernels.linear_attention import api, autograd, launches
from gbla_kernels.testing.compiled_kernels import replace_launches, specialization


class Clock:
    def restart(self):
        pass

    def step(self, name):
        pass


def launched(lengths, head_dim):
    found = set()
    replace_launches(lambda *launch: found.add(specialization(*launch)), *modules, capability=90)
    cold_start.run_batch(lengths, head_dim, Clock())
    return found


modules = (api, autograd, launches, conv_api, conv_autograd)
cold_start.DEVICE = "cpu"
# no kernel reads them
torch.randn, torch.randn_like = torch.empty, torch.empty_like
head_dim = int(sys.argv[2])
first = launched(cold_start.first_lengths(), head_dim)
later = set().union(*(launched(lengths, head_dim) for lengths in cold_start.random_batches()))
print(json.dumps([sorted(found) for found in (first, later)]))
"""


@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_hundred_random_batches_launch_no_kernel_that_the_first_batch_did_not(head_dim):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LAUNCHED, str(BENCHMARKS), str(head_dim)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, later = (set(found) for found in json.loads(done.stdout))
    assert later <= first, [words[:80] for words in later - first]
    names = [words.split()[0] for words in first]
    # forward and backward; tiny rows have a kernel for each of three lengths
    expected = [*["tiny_row_kernel"] * 3, *["tiny_row_backward_kernel"] * 3, "row_kernel", "row_backward_kernel", "state_kernel"]
    expected += ["output_kernel", "query_backward_kernel", "key_backward_kernel", "combine_states_kernel", "combine_gradients_kernel"]
    assert sorted(name for name in names if "conv1d" not in name) == sorted(expected)
