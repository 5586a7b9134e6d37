"""What the causal convolutions also owe on a GPU: no waiting, no second compilation, the same bits however they are called."""

# B rows, L tokens, D model width (docs/shapes.md)

import random
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from gbla_kernels.layout import JaggedLayout
from gbla_kernels.testing.conv_laws import ConvSubject, Tensors
from gbla_kernels.testing.cuda_graph import capture
from gbla_kernels.testing.device_waits import synchronisations_raise

BATCHES = ([0, 3, 700, 64, 5000, 9], [70, 2000, 0, 900, 513, 64, 1], [3, 4, 4000, 600, 5, 6, 7, 8], [2, 3])
Outcome = list[Tensor]
"""Output and gradients."""


def _run(op: Callable[..., Tensor], tensors: Tensors) -> Outcome:
    leaves = [tensor for tensor in tensors.values() if tensor is not None]
    y = op(**tensors)
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]


def _assert_same_bits(actual: Outcome, expected: Outcome) -> None:
    for number, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert torch.equal(a, b), f"result {number}"


def calls_do_not_synchronise(subject: ConvSubject, has_layout: bool) -> None:
    """Forward and backward, with a layout and without."""
    tensors, layout = subject.inputs(BATCHES[0], 0)
    op = subject.call(layout) if has_layout else subject.call(layout, layout=None)
    # the first call compiles
    expected = _run(op, tensors)
    with synchronisations_raise():
        actual = _run(op, tensors)
    _assert_same_bits(actual, expected)


def cuda_graph_replays(subject: ConvSubject, has_layout: bool) -> None:
    """A captured forward and backward gives what a call gives, for new values in the same memory."""
    tensors, layout = subject.inputs(BATCHES[0], 0)
    others, _ = subject.inputs(BATCHES[0], 1)
    op = subject.call(layout) if has_layout else subject.call(layout, layout=None)
    captured, replay = capture(lambda: _run(op, tensors))
    with torch.no_grad():
        for name, tensor in tensors.items():
            other = others[name]
            if tensor is not None and other is not None:
                tensor.copy_(other)
    replay()
    _assert_same_bits(captured, _run(op, others))


def batches_compile_nothing_new(subject: ConvSubject, monkeypatch: Any) -> None:
    """After one batch, whatever the number of tokens and rows."""
    compiled: list[str] = []

    def count(**event: object) -> None:
        compiled.append(str(event["repr"]))

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", count)
    tensors, layout = subject.inputs(BATCHES[0], 0)
    _run(subject.call(layout), tensors)
    assert compiled, "the hook sees compilations"
    compiled.clear()
    generator = random.Random(0)
    batches = [[], [0], [1], [16], [17], *([generator.randint(0, 2000) for _ in range(generator.randint(1, 20))] for _ in range(95))]
    for number, lengths in enumerate(batches):
        tensors, layout = subject.inputs(lengths, number)
        _run(subject.call(layout) if number % 2 else subject.call(layout, layout=None), tensors)
        assert not compiled, f"batch {number} of lengths {lengths} compiled {compiled}"


def compiled_equals_eager(subject: ConvSubject, has_layout: bool) -> None:
    """Under torch.compile with symbolic sizes, in one compilation for all batches."""

    def call(tensors: Tensors, offsets: Tensor, layout: JaggedLayout | None) -> Tensor:
        return subject.op(**tensors, offsets=offsets, layout=layout, activation=subject.activation, backend=subject.backend)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=True)
    for lengths in BATCHES:
        tensors, layout = subject.inputs(lengths, 0)
        given = (layout.offsets, layout if has_layout else None)
        actual, expected = (_run(lambda op=op, given=given, **leaves: op(leaves, *given), tensors) for op in (compiled, call))
        _assert_same_bits(actual, expected)
    assert counter.frame_count == 1, f"{counter.frame_count} compilations for {len(BATCHES)} batches"


def tokens_past_2_to_the_31_elements_are_reached(subject: ConvSubject) -> None:
    """The last row lies past element 2**31 of x, y and their gradients; bit for bit a small call on that row."""
    last = 5003
    lengths = [2**31 // subject.dim, last]
    generator = torch.Generator(subject.device).manual_seed(0)

    def normal() -> Tensor:
        shape = (sum(lengths), subject.dim)
        return torch.empty(shape, dtype=subject.dtype, device=subject.device).normal_(generator=generator)

    parameters = {name: tensor for name, tensor in subject.inputs([1], 0)[0].items() if name != "x"}

    def run(lengths: list[int], x: Tensor, d_y: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = subject.call(JaggedLayout.from_lengths(lengths).to(subject.device))(x=leaf, **parameters)
        return [y.detach()[-last:], *(gradient[-last:] for gradient in torch.autograd.grad(y, leaf, d_y))]

    x, d_y = normal(), normal()
    _assert_same_bits(run(lengths, x, d_y), run([last], x[-last:].clone(), d_y[-last:].clone()))
