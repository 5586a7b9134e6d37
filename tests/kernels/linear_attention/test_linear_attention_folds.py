"""Who adds up the states of splits: each reader, which saves a launch, or one more kernel. The laws hold their bits equal."""

import json
from collections.abc import Callable

LAUNCHED = """
import json

from gbla_kernels.testing.compiled_kernels import call_op

found = {}
for head_dim in (64, 128):
    # 2, 4, 6 and 8 splits of one row, 8 and 10 of rows with two each
    for lengths in ([512], [1024], [1536], [4096], [300] * 4, [300] * 5):
        names = []
        call_op(lambda kernel, *launch: names.append(kernel.fn.__name__), lengths, head_dim, capability=90, with_backward=True)
        found[f"{head_dim} {lengths}"] = "combine_states_kernel" in names
print(json.dumps(found))
"""


def test_readers_add_up_few_and_small_states(run_without_interpreter: Callable[[str], str]) -> None:
    is_combined = json.loads(run_without_interpreter(LAUNCHED))
    readers_add = {case for case, is_combined in is_combined.items() if not is_combined}
    # wide states of four splits: 256 readers would load 50 MB more than once
    few = {"64 [512]", "64 [1024]", "64 [1536]", f"64 {[300] * 4}", f"128 {[300] * 4}", "128 [512]"}
    assert readers_add == few
