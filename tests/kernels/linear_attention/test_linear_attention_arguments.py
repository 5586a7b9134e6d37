"""What gated linear attention accepts and what it refuses, on both backends."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, gated_linear_attention
from gbla_kernels.dispatch import INTERPRETED
from gbla_kernels.linear_attention.autograd import attend
from gbla_kernels.row_splits import SHORT_LIMIT, SPLIT, RowSplits
from gbla_kernels.testing.attention_laws import assert_equivalent
from gbla_kernels.testing.attention_subject import Subject, Variant, assert_same_bits, assert_within, output_weights, results

# where kernels are compiled, "-m gpu" runs these too
pytestmark = [] if INTERPRETED else pytest.mark.gpu

REFERENCE = Subject(backend=Backend.REFERENCE, dtype=torch.float64)
TRITON = Subject(backend=Backend.TRITON, dtype=torch.float32, device="cpu" if INTERPRETED else "cuda")
CAUSAL = replace(REFERENCE, variant=Variant(direction="causal"))
backends = pytest.mark.parametrize("subject", [REFERENCE, TRITON], ids=["reference", "triton"])


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("subject", [REFERENCE, CAUSAL, TRITON], ids=["reference", "causal", "triton"])
@pytest.mark.parametrize("has_layout", [True, False], ids=["layout", "offsets"])
def test_no_tokens_give_no_output_and_zero_gradients(lengths: list[int], subject: Subject, has_layout: bool) -> None:
    inputs, layout = subject.inputs(lengths, seed=0)
    outcome = subject.run(inputs, layout, has_layout=has_layout)
    assert outcome["output"].shape == (0, subject.num_heads, subject.value_dim)
    assert torch.equal(outcome["d_norm_weight"], torch.zeros_like(inputs["norm_weight"]))
    assert all(outcome[f"d_{name}"].shape == tensor.shape for name, tensor in inputs.items())


@backends
def test_a_gradient_asked_for_alone_is_the_same(subject: Subject) -> None:
    inputs, layout = subject.inputs([3, 0, 19], seed=0)
    together = subject.run(inputs, layout)
    for name in inputs:
        leaves = {other: x.clone().requires_grad_(other == name) for other, x in inputs.items()}
        output = subject.op(layout)(**leaves)
        (gradient,) = torch.autograd.grad(output, [leaves[name]], output_weights(output).to(output.dtype))
        assert_same_bits({name: gradient}, {name: together[f"d_{name}"]})


@backends
def test_inference_needs_no_graph(subject: Subject) -> None:
    inputs, layout = subject.inputs([0, 3, 66], seed=0)
    with torch.inference_mode():
        output = subject.op(layout)(**inputs)
    assert torch.equal(output, subject.run(inputs, layout)["output"])


@pytest.mark.parametrize("absent", [(), ("key_gate", "norm_weight")], ids=["full", "bare"])
def test_state_path_equals_the_one_launch_path(absent: tuple[str, ...]) -> None:
    subject = replace(TRITON, variant=Variant(absent=absent))
    inputs, layout = subject.inputs([0, 1, 70, 3, 19], seed=0)
    splits = RowSplits.from_lengths(layout.offsets_cpu.diff(), short_limit=0).map(lambda table: table.to(subject.device))

    def by_state(**tensors: Tensor | None) -> Tensor:
        return attend(**tensors, splits=splits, feature_map="elu1", normalize=True, eps=1e-6)  # type: ignore[arg-type]

    assert_equivalent(subject, inputs, layout, results(by_state, inputs))


@pytest.mark.parametrize("normalize", [True, False])
def test_gates_may_have_another_dtype_than_query(normalize: bool) -> None:
    subject = replace(REFERENCE, dtype=torch.bfloat16, variant=Variant(normalize=normalize))
    inputs, layout = subject.inputs([5, 66], seed=0)
    wide = {name: inputs[name].float() for name in ("key_gate", "output_gate", "norm_weight")}
    outcome = subject.run({**inputs, **wide}, layout)
    assert torch.equal(outcome["output"], subject.run(inputs, layout)["output"])
    assert outcome["output"].dtype == outcome["d_query"].dtype == torch.bfloat16
    assert all(outcome[f"d_{name}"].dtype == torch.float32 for name in wide)


def arguments(**changes: object) -> dict[str, object]:
    x = torch.zeros(3, 2, 5)
    tensors = {"query": x, "key": x, "value": torch.zeros(3, 2, 3), "offsets": torch.tensor([0, 1, 3])}
    return {**tensors, "key_gate": None, "output_gate": None, "norm_weight": None, **changes}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"key": torch.zeros(3, 2, 4)}, "key must have shape"),
        ({"value": torch.zeros(3, 2, 3, dtype=torch.float16)}, "value must have the dtype of query"),
        ({"query": torch.zeros(3, 2, 5, dtype=torch.int64)}, "query must be one of"),
        ({"key_gate": torch.zeros(3, 1)}, "key_gate must have shape"),
        ({"output_gate": torch.zeros(3, 2, 5)}, "output_gate must have shape"),
        ({"norm_weight": torch.zeros(3)}, "norm_weight must have shape"),
        ({"key_gate": torch.zeros(3, 2, dtype=torch.int64)}, "key_gate must be one of"),
        ({"output_gate": torch.zeros(3, 2, 3, dtype=torch.int64)}, "output_gate must be one of"),
        ({"norm_weight": torch.zeros(2, 3, dtype=torch.int64)}, "norm_weight must be one of"),
        ({"offsets": torch.tensor([0, 2])}, "offsets must rise from 0 to the number of tokens 3"),
        ({"offsets": torch.tensor([0, 3], dtype=torch.int32)}, "offsets must be int64"),
        ({"feature_map": "gelu"}, "feature_map must be one of"),
        ({"direction": "backward"}, "direction must be one of"),
        ({"direction": "causal", "normalize": False}, "normalize must be True"),
    ],
)
@pytest.mark.parametrize("backend", [Backend.REFERENCE, Backend.TRITON])
def test_bad_arguments_are_named(change: dict[str, object], message: str, backend: Backend) -> None:
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(**arguments(**change), backend=backend)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"direction": "causal"}, "direction='causal'.*backend=Backend.REFERENCE"),
        ({"query": torch.zeros(3, 2, 257), "key": torch.zeros(3, 2, 257)}, r"256.*257.*backend=Backend.REFERENCE"),
        ({"value": torch.zeros(3, 2, 300)}, r"256.*300.*backend=Backend.REFERENCE"),
        ({name: torch.zeros(3, 2, 5, dtype=torch.float64) for name in ("query", "key", "value")}, "float64.*backend=Backend.REFERENCE"),
    ],
    ids=["causal", "wide_key", "wide_value", "fp64"],
)
def test_triton_names_what_it_lacks_and_the_cure(change: dict[str, object], message: str) -> None:
    given = {name: x.to(TRITON.device) if isinstance(x, Tensor) else x for name, x in arguments(**change).items()}
    with pytest.raises(NotImplementedError, match=message):
        gated_linear_attention(**given, backend=Backend.TRITON)  # type: ignore[arg-type]


@pytest.mark.skipif(INTERPRETED, reason="the interpreter runs on the CPU")
def test_triton_refuses_cpu_tensors() -> None:
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        gated_linear_attention(**arguments(), backend=Backend.TRITON)  # type: ignore[arg-type]


@pytest.mark.parametrize("length", [40, SHORT_LIMIT, SPLIT, 2 * SPLIT + 1])
def test_minus_infinity_in_query_and_key_is_mapped_to_zero(length: int) -> None:
    subject = replace(TRITON, dtype=torch.float32 if INTERPRETED else torch.bfloat16, key_dim=32, value_dim=32)
    inputs, layout = subject.inputs([length, 3], seed=4)
    inputs["query"][1, 0, 5] = inputs["query"][length - 1, 1] = -torch.inf
    inputs["key"][2, 1, 7] = inputs["key"][length - 2, 0] = -torch.inf
    exact = subject.exact(inputs, layout)
    assert all(bool(x.isfinite().all()) for x in exact.values())
    assert_within(subject.run(inputs, layout), exact, subject.budget(inputs, layout, exact))
