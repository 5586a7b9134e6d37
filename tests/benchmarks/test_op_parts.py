"""What the reports of the op's parts and of its kernels' counters say of known inputs."""

from functools import partial

import pytest
import torch

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention


@pytest.fixture
def case_and_inputs(benchmarks_on_path, monkeypatch):
    import linear_attention
    from row_lengths import Case

    monkeypatch.setattr(linear_attention, "DEVICE", "cpu")
    case = Case("two rows", (5, 3))
    return case, linear_attention.InputSet.random(case, 8, seed=0)


def test_a_variant_leaves_out_what_it_names_and_nothing_else(case_and_inputs):
    from op_parts import VARIANTS

    case, inputs = case_and_inputs
    layout = JaggedLayout.from_lengths(case.lengths)
    given = {"offsets": layout.offsets, "layout": layout, "backend": Backend.REFERENCE}
    expected = {
        "the op": {},
        "without key gate": {"key_gate": None},
        "without output gate": {"output_gate": None},
        "without norm": {"norm_weight": None},
        "without normaliser": {"normalize": False},
        "relu in place of elu1": {"feature_map": "relu"},
    }
    outputs = {name: VARIANTS[name].op(layout, Backend.REFERENCE)(*inputs.leaves) for name in expected}
    for name, settings in expected.items():
        assert torch.equal(outputs[name], gated_linear_attention(**inputs.tensors | settings, **given)), name
    # the norm takes the normaliser's scale away
    del outputs["without normaliser"]
    assert len({tuple(output.flatten().tolist()) for output in outputs.values()}) == len(outputs)


def test_with_nothing_left_in_the_op_is_the_peers_product(case_and_inputs):
    from op_parts import VARIANTS

    case, inputs = case_and_inputs
    layout, bare = JaggedLayout.from_lengths(case.lengths), inputs.mapped()
    query, key, value = (leaf.detach().double() for leaf in bare.leaves)
    rows = [slice(start, stop) for start, stop in zip(layout.offsets_cpu[:-1], layout.offsets_cpu[1:], strict=True)]
    exact = torch.cat([torch.einsum("thk,shk,shv->thv", query[row], key[row], value[row]) / len(key[row]) for row in rows])
    found = VARIANTS["none of these"].op(layout, Backend.REFERENCE)(*bare.leaves)
    assert torch.allclose(found.double(), exact, rtol=2e-2, atol=2e-2)


def test_the_floor_of_the_whole_op_is_that_of_its_own_report(benchmarks_on_path):
    from linear_attention import floor_bytes
    from op_parts import VARIANTS

    for with_backward in (False, True):
        floors = {name: variant.floor_bytes(10, 64, with_backward) for name, variant in VARIANTS.items()}
        assert floors["the op"] == floor_bytes(10, 64, with_backward)
        assert (
            floors["without norm"]
            == floors["the op"]
            > floors["without key gate"]
            > floors["without output gate"]
            > floors["none of these"]
        )


def test_counters_are_read_from_the_profilers_table(benchmarks_on_path):
    from kernel_counters import LATENCY, PERCENTAGES, STALL_PREFIX, STALL_SUFFIX, TIME, kernel_rows

    stalls = {"long_scoreboard": "3", "selected": "1", "wait": "1.5", "barrier": "0.5", "math_pipe_throttle": "0.25"}
    columns = {
        "ID": ("", "0"),
        "Kernel Name": ("", "void at::reduce_kernel<128, f(int)>(T3)"),
        TIME: ("ns", "1,234.5"),
        PERCENTAGES["memory (% of peak)"]: ("%", "40.5"),
        "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active": ("%", "26.4"),
        "sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active": ("%", "3"),
        LATENCY: ("inst", "6.25"),
        **{f"{STALL_PREFIX}{name}{STALL_SUFFIX}": ("inst", value) for name, value in stalls.items()},
    }
    line = partial(",".join)
    quoted = [line(f'"{cell}"' for cell in cells) for cells in (columns, *zip(*columns.values(), strict=True))]
    rows = kernel_rows("\n".join(["==PROF== Connected", *quoted, "==PROF== Disconnected"]))
    assert rows == [
        {
            "kernel": "at::reduce_kernel",
            "us": 1.2345,
            "memory (% of peak)": 40.5,
            "L1 (% of peak)": None,
            "busiest pipe (%)": "alu 26",
            "warps a scheduler": None,
            "of these ready": None,
            "waits": "long scoreboard 48%, wait 24%, selected 16%, barrier 8%",
        }
    ]
