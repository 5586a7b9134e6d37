"""Errors beside speeds: ``|x - exact| / |exact|`` against fp64, and the budget, twice the error of a reference on the same inputs."""

# B rows, L tokens (docs/shapes.md)

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_timing import Call, Figure, attempt, ratio
from op_calls import Op, Operands, forward_backward
from row_lengths import Case
from torch import Tensor

from gbla_kernels.testing.error_budget import FACTOR, relative_error

MAX_ROWS, MAX_TOKENS = 64, 65536
"""Of the rows on which errors are taken: references run row by row, and fp64 takes memory."""
COLUMNS = ("error", "budget", "of tensor")
MEANING = (
    "Errors: |x - exact| / |exact| against the reference in fp64; the budget is twice the error of the reference on the same bf16 inputs "
    "(fp32 inside, one rounding); of the gradients the one that uses most of its budget is shown"
)
"""For the notes of a report."""


@dataclass(frozen=True, eq=False)
class _Doubled:
    leaves: list[Tensor]
    d_output: Tensor


def first_rows(case: Case, *, max_rows: int = MAX_ROWS, max_tokens: int = MAX_TOKENS) -> Case | None:
    """The first rows, as many as the bounds allow; None if a bound does not even allow the first."""
    lengths = case.lengths[:max_rows]
    while sum(lengths) > max_tokens:
        lengths = lengths[:-1]
    return Case(case.name, lengths) if lengths else None


def op_errors(op: Op, reference: Op, operands: Operands, names: Sequence[str], *, allow_unused: bool = False) -> dict[str, Figure]:
    """``tensor_errors`` of output and gradients: ``y`` and ``d<name>`` for each name of a leaf.

    Args:
        op: what is judged.
        reference: computes in fp32 and rounds once; in fp64 for operands in fp64.
        operands: given to both, and to the reference once more in fp64.
        names: of the leaves, in their order.
        allow_unused: leave leaves out that the op does not read.
    """

    def run(which: Op, given: Operands) -> list[Tensor | None]:
        return forward_backward(which, given, allow_unused=allow_unused)

    doubled = _Doubled([leaf.detach().double().requires_grad_() for leaf in operands.leaves], operands.d_output.double())
    names = ("y", *(f"d{name}" for name in names))
    return tensor_errors(names, lambda: run(op, operands), lambda: run(reference, operands), lambda: run(reference, doubled))


def tensor_errors(names: Sequence[str], actual: Call, rounded: Call, exact: Call) -> dict[str, Figure]:
    """The error of each tensor by its name, and under ``<name> budget`` twice that of ``rounded``.

    Args:
        names: of the tensors that the three calls return, ``y`` first; what a call returns None for is left out.
        actual: what is judged; if it raises, ``y`` has the error's text, and nothing else is there.
        rounded: the same from the same inputs, by the reference.
        exact: the same in fp64.
    """
    found = _compared(names, {"exact": attempt(exact), "rounded": attempt(rounded), "actual": attempt(actual)})
    if torch.cuda.is_available():
        # what fp64 took is of no use to a CUDA graph, whose memory is its own
        torch.cuda.empty_cache()
    return found


def _compared(names: Sequence[str], results: Mapping[str, Any]) -> dict[str, Figure]:
    failed = {what: text for what, text in results.items() if isinstance(text, str)}
    if failed:
        return {"y": failed.get("actual") or ", ".join(f"{what}: {text}" for what, text in failed.items())}
    found: dict[str, Figure] = {}
    for name, value, reference, truth in zip(names, results["actual"], results["rounded"], results["exact"], strict=True):
        if value is not None:
            found[name] = relative_error(value, truth)
            found[f"{name} budget"] = FACTOR * relative_error(reference, truth)
    return found


def error_columns(errors: Mapping[str, Figure], *, with_backward: bool) -> dict[str, Any]:
    """``error``, ``budget`` and ``of tensor``: those of the output, or with a backward of the worst gradient; empty if not measured."""
    return worst_gradient(errors) if with_backward else output_error(errors)


def output_error(errors: Mapping[str, Figure]) -> dict[str, Any]:
    return {"error": errors.get("y"), "budget": errors.get("y budget"), "of tensor": "y" if "y" in errors else None}


def worst_gradient(errors: Mapping[str, Figure]) -> dict[str, Any]:
    """The gradient that uses the largest share of its budget."""
    names = [name.removesuffix(" budget") for name in errors if name.endswith(" budget") and not name.startswith("y")]
    if not names:
        return dict.fromkeys(COLUMNS)
    worst = max(names, key=lambda name: _share(errors[name], errors[f"{name} budget"]))
    return {"error": errors[worst], "budget": errors[f"{worst} budget"], "of tensor": worst}


def _share(error: Figure, budget: Figure) -> float:
    """Of the budget that is used; NaN is beyond any."""
    if error == 0:
        return 0.0
    share = ratio(error, budget) if budget else None
    return share if share is not None and not math.isnan(share) else math.inf
