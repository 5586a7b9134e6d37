import json
import os
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import triton

from gbla_kernels import Backend, JaggedLayout, gated_linear_attention
from gbla_kernels.testing.error_budget import outputs_and_gradients, relative_error
from gbla_kernels.testing.inputs import attention_inputs

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
GPU_SCRIPTS = [
    *("causal_conv1d.py", "cold_start.py", "gbla_layer.py", "kernel_counters.py"),
    *("linear_attention.py", "op_parts.py", "softmax_attention.py"),
]


@pytest.mark.parametrize("script", GPU_SCRIPTS)
def test_a_gpu_benchmark_without_a_gpu_says_so_and_succeeds(script, benchmarks_on_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{script}"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(BENCHMARKS / script), run_name="__main__")
    assert exit_.value.code == 0
    assert capsys.readouterr().out.splitlines() == [f"{script}: skipped, it needs a CUDA GPU"]


def test_a_report_has_its_origin_every_table_and_the_plot(benchmarks_on_path, monkeypatch, tmp_path):
    from report import COMMIT_VARIABLE, write_report
    from time_plot import plot_times

    monkeypatch.setenv(COMMIT_VARIABLE, "0123456789ab")
    plot = plot_times("speed", {"panel": {"ours": [(512, 0.1), (1024, 0.2)], "floor": [], "peer": [(512, 0.3)]}}, directory=tmp_path)
    rows = [{"T": 512, "ms": 0.123456, "peer (ms)": None}, {"T": 1024, "ms": "OutOfMemoryError: too large"}]
    path = write_report("speed", rows, "python x.py", "notes", tables={"Errors": [{"y": 0.5}]}, plots=[plot], directory=tmp_path)
    text, report = path.read_text(), json.loads((tmp_path / "speed.json").read_text())
    for expected in ("| 512 | 0.1235 |  |", "| 1,024 | OutOfMemoryError: too large |  |", "## Errors", "(speed.svg)", "0123456789ab"):
        assert expected in text
    assert report["commit"] == "0123456789ab" and report["tables"] == {"Errors": [{"y": 0.5}]} and plot.stat().st_size > 0


def test_the_plain_peer_computes_the_op(benchmarks_on_path):
    from plain_attention import plain_attention

    inputs, layout = attention_inputs([131], num_heads=2, key_dim=16, value_dim=16, dtype=torch.float32)
    reference = partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE)
    expected = outputs_and_gradients(reference, inputs)
    for name, value in outputs_and_gradients(plain_attention, inputs).items():
        assert relative_error(value, expected[name]) < 1e-5, name


def test_calls_give_an_op_its_arguments_in_order_and_take_every_gradient(benchmarks_on_path, monkeypatch):
    import linear_attention
    from op_calls import calls
    from row_lengths import Case

    monkeypatch.setattr(linear_attention, "DEVICE", "cpu")
    case = Case("two rows", (5, 3))
    layout = JaggedLayout.from_lengths(case.lengths)
    op = partial(gated_linear_attention, offsets=layout.offsets, layout=layout, backend=Backend.REFERENCE)
    sets = [linear_attention.InputSet.random(case, 8, seed) for seed in range(2)]
    for operands, forward, both in zip(sets, calls(op, sets, False), calls(op, sets, True), strict=True):
        output = op(**operands.tensors)
        gradients = torch.autograd.grad(output, list(operands.tensors.values()), operands.d_output)
        assert torch.equal(forward(), output) and not forward().requires_grad
        for found, expected in zip(both(), (output, *gradients), strict=True):
            assert not found.requires_grad and torch.equal(found, expected)


def test_an_op_that_leaves_an_operand_out_is_refused_unless_allowed(benchmarks_on_path, monkeypatch):
    import causal_conv1d
    from op_calls import calls

    monkeypatch.setattr(causal_conv1d, "DEVICE", "cpu")
    operands = causal_conv1d.Operands.random(5, 8, seed=0)

    def op(x, norm_weight, weight, bias):
        return x * weight[:, 0] + bias

    with pytest.raises(RuntimeError, match="allow_unused"):
        calls(op, [operands], True)[0]()
    found = calls(op, [operands], True, allow_unused=True)[0]()
    assert [gradient is None for gradient in found] == [False, False, True, False, False]


def test_cases_have_the_tokens_that_they_name(benchmarks_on_path):
    from row_lengths import SHORT_ROWS, ZIPF_ROWS, ZIPF_TOKENS, one_token_less, one_token_moved, short, uniform, zipf

    even = uniform(32, 2048)
    assert even.num_tokens == 65536 and even.is_uniform and not even.is_single
    less, moved = one_token_less(32, 2048), one_token_moved(32, 2048)
    assert less.num_tokens == even.num_tokens - 1 and max(less.lengths) == 2048 and moved.num_tokens == even.num_tokens
    for twin in (less, moved):
        assert len(twin.lengths) == 32 and JaggedLayout.from_lengths(twin.lengths).uniform_length == 0
        assert sum(length != 2048 for length in twin.lengths) <= 2 and abs(sum(x**2 for x in twin.lengths) / (32 * 2048**2) - 1) < 1e-4
    assert zipf().num_tokens == ZIPF_TOKENS and len(zipf().lengths) == ZIPF_ROWS
    assert len(short().lengths) == SHORT_ROWS and 8 < short().num_tokens / SHORT_ROWS < 10
    assert JaggedLayout.from_lengths(zipf().lengths).max_length > 10_000


@pytest.mark.parametrize("make", ["one_token_less", "one_token_moved"])
def test_softmax_attention_gives_ragged_rows_a_dense_peer_of_as_many(make, benchmarks_on_path, monkeypatch):
    import row_lengths
    import softmax_attention as script

    monkeypatch.setattr(script, "DEVICE", "cpu")
    monkeypatch.setattr(script, "NUM_HEADS", 1)
    # any two numbers of rows and tokens
    twin = getattr(row_lengths, make)(4, 8)
    monkeypatch.setattr(script, "EVEN", row_lengths.uniform(4, 8))
    monkeypatch.setattr(script, "RAGGED_TWINS", (twin,))
    monkeypatch.setattr(script, "input_sets", lambda make, size: [make(0), make(1)])
    monkeypatch.setattr(script, "first_call_seconds", lambda call: 0.5)
    monkeypatch.setattr(script, "dense_attention", lambda kernel: torch.nn.functional.scaled_dot_product_attention)
    shapes = []

    def elements(calls):
        found = calls[0]()
        shapes.append(tuple((found if isinstance(found, torch.Tensor) else found[0]).shape))
        return float(len(shapes[-1]))

    monkeypatch.setattr(script, "graph_ms", elements)
    monkeypatch.setattr(script, "varlen", lambda queries, keys: lambda query, key, value: query + key + value)
    rows = script.measure_self(twin, 16)
    assert [row["jagged / dense cuDNN"] for row in rows] == [3 / 4, 3 / 4], "dense tensors have a dimension more"
    assert all(row["dense flash (ms)"] == 4 and row["varlen (ms)"] == 3 for row in rows)
    assert set(shapes) == {(twin.num_tokens, 1, 16), (4, 1, 8, 16)}
    assert "dense cuDNN (ms)" not in script.measure_self(script.Case("other", (5, 3)), 16)[0]


def test_softmax_attention_measures_ragged_rows_in_launches_of_their_own_size(benchmarks_on_path, monkeypatch):
    import softmax_attention as script

    from gbla_rec.models import length_classes

    monkeypatch.setattr(length_classes, "_KNOWN_SHAPES", length_classes.KnownShapes())
    launches = {}
    for case in script.SELF_CASES:
        layout = JaggedLayout.from_lengths(case.lengths)
        if not case.is_uniform:
            launches[case.name] = [
                (rows.num_rows, rows.max_length) for rows in length_classes.class_rows(layout.offsets, layout.offsets_cpu)
            ]
            with monkeypatch.context() as alone:
                alone.setattr(length_classes, "_KNOWN_SHAPES", length_classes.KnownShapes())
                again = JaggedLayout.from_lengths(case.lengths)
                own = [(rows.num_rows, rows.max_length) for rows in length_classes.class_rows(again.offsets, again.offsets_cpu)]
            assert launches[case.name] == own, "not in a larger plan that a case before it left"
    less, moved = (launches[case.name] for case in script.RAGGED_TWINS)
    assert less == [(32, 2048)], "no empty block, as in the dense batch"
    assert moved == [(1, 4096), (32, 2048)]


def test_a_quick_look_leaves_the_committed_reports_alone(benchmarks_on_path, monkeypatch, workspace):
    import argparse

    import gpu_timing
    import step_sizes
    from report import RESULTS

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    quick = ("--quick", "out", lambda: gpu_timing.arguments_or_exit(argparse.ArgumentParser()))
    smoke = ("--smoke", "directory", lambda: step_sizes.parse(None))
    for option, name, read in (quick, smoke):
        for given, expected in (([], RESULTS), ([option], workspace / "benchmarks"), ([option, f"--{name}", "here"], Path("here"))):
            monkeypatch.setattr(sys, "argv", ["x.py", *given])
            assert getattr(read(), name) == expected


def test_a_whole_training_step_without_a_gpu_says_so_and_succeeds(benchmarks_on_path, monkeypatch, capsys):
    import step_sizes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/training_step.py"])
    with pytest.raises(SystemExit) as exit_:
        step_sizes.parse(None)
    assert exit_.value.code == 0
    assert capsys.readouterr().out == "training_step.py: skipped, it needs a CUDA GPU; --smoke runs tiny sizes anywhere\n"


def test_kernels_compile_for_hopper_anywhere_and_the_output_fits_as_often_as_it_did(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = str(BENCHMARKS / "kernel_resources.py")
    command = [sys.executable, script, "--quick", "--head-dims", "64", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = {row["kernel"]: row for row in json.loads((tmp_path / "kernel_resources.json").read_text())["rows"]}
    assert set(kernels) == {"state_kernel", "combine_states_kernel", "output_kernel"}
    assert all(row["stack (bytes)"] == row["local"] == 0 and row["instructions"] > 100 for row in kernels.values()), "nothing is spilled"
    # Triton 3.6 ran on the GPUs of the reports
    registers, programs = (128, 4) if triton.__version__.startswith("3.6.") else (140, 3)
    assert kernels["output_kernel"]["registers"] <= registers and kernels["output_kernel"]["programs"] >= programs


LIMITED = """
import json
import sys

sys.path.insert(0, sys.argv[1])
from kernel_resources import compiled_kernels

cases = ((64, 100), (64, 60), (64, 30), (64, 10), (128, 100))
print(json.dumps([compiled_kernels(length, head_dim, with_backward=False)[0] for head_dim, length in cases]))
"""


def test_limits_on_registers_buy_programs_and_cost_few_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", LIMITED, str(BENCHMARKS)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert [row["kernel"] for row in rows] == ["row_kernel", "tiny_row_kernel", "tiny_row_kernel", "tiny_row_kernel", "row_kernel"]
    # without limits 3, 3, 8, 16 and 1
    assert [row["programs"] for row in rows] == [4, 4, 10, 20, 2]
    assert all(row["stack (bytes)"] <= 168 for row in rows)


def test_programs_at_once_are_bound_by_what_runs_out_first(benchmarks_on_path):
    from kernel_resources import programs_at_once

    assert programs_at_once(128, 128, 0) == 4 and programs_at_once(128, 129, 0) == 3
    # each scheduler has a quarter of the registers, and a warp all of its own in one of them
    assert programs_at_once(64, 104, 0) == 8 and programs_at_once(32, 96, 0) == 20
    assert programs_at_once(128, 64, 100_000) == 2 and programs_at_once(1024, 16, 0) == 2 and programs_at_once(32, 16, 0) == 32
