"""The errors that reports show beside speeds: half of the budget for the reference itself, beyond it where something is wrong."""

import math
from functools import partial

import pytest
import torch

from gbla_kernels import Backend, gated_linear_attention
from gbla_rec.models.layers import GatedBidirectionalLinearAttention

LENGTHS = (5, 1, 40)
LAYER_TENSORS = ["y", "dx", "dconv_weight", "dconv_bias", "dnorm_weight", "din_projection.weight", "dout_projection.weight"]


@pytest.fixture
def errors_of(benchmarks_on_path, monkeypatch):
    """``errors_of(script)``: what a benchmark finds on the CPU where the reference stands in for what it measures."""
    import causal_conv1d
    import gbla_layer
    import linear_attention
    import softmax_attention
    from row_lengths import Case

    for script in (causal_conv1d, gbla_layer, linear_attention, softmax_attention):
        monkeypatch.setattr(script, "DEVICE", "cpu")
    reference = {"backend": Backend.REFERENCE}
    case = Case("three rows", LENGTHS)

    def linear():
        monkeypatch.setattr(
            linear_attention,
            "triton_op",
            lambda layout: partial(gated_linear_attention, offsets=layout.offsets, layout=layout, **reference),
        )
        return linear_attention.case_errors(case, 8)

    def layer():
        config = gbla_layer.config(64)
        return gbla_layer.layer_errors(GatedBidirectionalLinearAttention(config, **reference).to(torch.bfloat16), case)

    def attention():
        monkeypatch.setattr(softmax_attention, "jagged_attention", partial(softmax_attention.jagged_cross_attention, **reference))
        return softmax_attention.self_errors(case, 8)

    def conv(op):
        return causal_conv1d.case_errors(partial(op, **reference), case, 16)

    found = {
        "linear_attention": linear,
        "gbla_layer": layer,
        "softmax_attention": attention,
        "conv": lambda: conv(causal_conv1d.conv),
        "fused": lambda: conv(causal_conv1d.fused),
    }
    return lambda name: found[name]()


@pytest.mark.parametrize(
    ("name", "tensors"),
    [
        ("linear_attention", ["y", "dquery", "dkey", "dvalue", "dkey_gate", "doutput_gate", "dnorm_weight"]),
        ("gbla_layer", LAYER_TENSORS),
        ("softmax_attention", ["y", "dquery", "dkey", "dvalue"]),
        ("conv", ["y", "dx", "dweight", "dbias"]),
        ("fused", ["y", "dx", "dnorm_weight", "dweight", "dbias"]),
    ],
)
def test_the_reference_uses_half_of_every_budget(name, tensors, errors_of):
    errors = errors_of(name)
    assert {key for key in errors if not key.endswith(" budget")} == set(tensors)
    for tensor in tensors:
        # in bf16, but for gradients of parameters in fp32
        assert 0 < errors[tensor] < 2e-2, (tensor, errors[tensor])
        assert errors[tensor] * 2 == errors[f"{tensor} budget"], tensor


def test_kernels_of_the_layer_are_held_against_the_reference(benchmarks_on_path, monkeypatch):
    import gbla_layer
    from row_lengths import Case

    monkeypatch.setattr(gbla_layer, "DEVICE", "cpu")
    layer = gbla_layer.gbla_layer(64)
    assert layer.backend is Backend.TRITON
    errors = gbla_layer.layer_errors(layer, Case("three rows", LENGTHS))
    assert layer.backend is Backend.TRITON and layer.norm_weight.dtype == torch.bfloat16, "the measured layer is left as it was"
    assert set(LAYER_TENSORS) < set(errors)
    # the interpreter cuts bf16 off instead of rounding it, at the end of each part
    assert all(0 < errors[name] < 4 * errors[f"{name} budget"] for name in LAYER_TENSORS), errors
    assert any(errors[name] * 2 != errors[f"{name} budget"] for name in LAYER_TENSORS), "not the reference twice"


def test_the_output_and_the_gradient_nearest_its_budget_are_shown(benchmarks_on_path):
    from exactness import COLUMNS, error_columns

    errors = {"y": 0.1, "y budget": 0.2, "da": 0.1, "da budget": 0.2, "db": 0.01, "db budget": 0.001, "dc": 0.0, "dc budget": 0.0}
    shown = partial(error_columns, errors)
    assert shown(with_backward=False) == {"error": 0.1, "budget": 0.2, "of tensor": "y"}
    assert shown(with_backward=True) == {"error": 0.01, "budget": 0.001, "of tensor": "db"}
    # NaN compares with nothing, and no budget allows no error
    for wrong in ({"dz": math.nan, "dz budget": 1.0}, {"dz": 1e-9, "dz budget": 0.0}):
        assert error_columns({**errors, **wrong}, with_backward=True)["of tensor"] == "dz"
    for with_backward in (False, True):
        assert error_columns({}, with_backward=with_backward) == dict.fromkeys(COLUMNS)


def test_an_op_that_fails_ends_no_benchmark(benchmarks_on_path):
    from exactness import error_columns, tensor_errors

    def fails():
        raise RuntimeError("no kernel for this")

    def works():
        return [torch.ones(3)]

    failed = tensor_errors(["y"], fails, works, works)
    assert error_columns(failed, with_backward=False) == {"error": "RuntimeError: no kernel for this", "budget": None, "of tensor": "y"}
    # not blamed on the op
    assert tensor_errors(["y"], works, works, fails) == {"y": "exact: RuntimeError: no kernel for this"}
    assert tensor_errors(["y"], works, works, works) == {"y": 0.0, "y budget": 0.0}


def test_errors_are_taken_on_rows_that_fp64_can_hold(benchmarks_on_path):
    import softmax_attention as script
    from exactness import MAX_ROWS, first_rows
    from row_lengths import uniform

    assert first_rows(uniform(3, 5), max_tokens=10).lengths == (5, 5)
    assert first_rows(uniform(1, 11), max_tokens=10) is None and len(first_rows(uniform(100, 2)).lengths) == MAX_ROWS
    assert script.error_rows(script.Case("a long row first", (9000, 5, 2048))).lengths == (5, 2048)
    parts = {case.name: script.error_rows(case) for case in script.SELF_CASES}
    long, packed, *ragged = (parts[case.name] for case in script.SELF_CASES if case.name != "8 x 8192")
    assert long is None and packed.lengths == (2048,) * 8
    for part in ragged:
        assert not part.is_uniform and max(part.lengths) > 256, "the kernel of long ragged rows runs"
        # a score of one head in fp64 is 8 bytes: 2 GB of 8 heads
        assert sum(length**2 for length in part.lengths) <= 2**25


def test_every_row_shows_an_error_beside_its_speed(benchmarks_on_path, monkeypatch):
    import causal_conv1d
    import gbla_layer
    import linear_attention
    import softmax_attention
    from gpu_timing import Ceilings
    from row_lengths import Case

    stubs = {"DEVICE": "cpu", "input_sets": lambda make, size: [make(0), make(1)], "graph_ms": lambda calls: 1.0}
    stubs |= {"first_call_seconds": lambda call: 1.0, "peak_megabytes": lambda call: 1.0, "kernel_names": lambda call: ["kernel"]}
    for script in (causal_conv1d, gbla_layer, linear_attention, softmax_attention):
        for name, stub in stubs.items():
            monkeypatch.setattr(script, name, stub, raising=False)
    case, ceilings = Case("three rows", LENGTHS), Ceilings(1.0, 1.0)
    tables = {
        "conv": causal_conv1d.measure(case, 16, ceilings),
        "op": linear_attention.measure_case(case, 16, ceilings, "none")[0],
        "layer": gbla_layer.measure_case(case, 64, ceilings),
        "self": softmax_attention.measure_selves([case], 16),
        "cross": softmax_attention.measure_cross(2, 9, 3, 16, ceilings),
    }
    for table, (forward, both) in tables.items():
        for prefix in ("conv ", "fused ") if table == "conv" else ("",):
            assert (forward[f"{prefix}of tensor"], both[f"{prefix}of tensor"][0]) == ("y", "d"), table
            for row in (forward, both):
                assert 0 < row[f"{prefix}error"] < 2e-2 and 0 < row[f"{prefix}budget"] < 2e-2, (table, row)
