"""Who adds up the states of splits: each reader, which saves a launch, or one more kernel. The laws hold their bits equal."""

import json
from collections.abc import Callable

LAUNCHED = """
import json

from gbla_kernels.testing.compiled_kernels import call_op

found = {}
for head_dim in (64, 128):
    # 2 to 9 splits of one row; rows of two splits and of one; one of each
    for lengths in ([512], [1024], [1536], [4096], [4200], [300] * 20, [300] * 80, [300] * 81, [200] * 500, [200, 9000]):
        names = []
        call_op(lambda kernel, *launch: names.append(kernel.fn.__name__), lengths, head_dim, capability=90, with_backward=True)
        found[f"{head_dim} {len(lengths)} x {lengths[0]}"] = "combine_states_kernel" in names
print(json.dumps(found))
"""


def test_readers_add_up_few_and_small_states(run_without_interpreter: Callable[[str], str]) -> None:
    is_combined = json.loads(run_without_interpreter(LAUNCHED))
    readers_add = {case for case, is_combined in is_combined.items() if not is_combined}
    # wide states of four splits: 256 readers would load 50 MB more than once; of 160 narrow ones of two splits each: 20 MiB
    narrow = {"64 1 x 512", "64 1 x 1024", "64 1 x 1536", "64 20 x 300", "64 80 x 300", "64 500 x 200"}
    wide = {"128 1 x 512", "128 20 x 300", "128 500 x 200"}
    assert readers_add == narrow | wide
