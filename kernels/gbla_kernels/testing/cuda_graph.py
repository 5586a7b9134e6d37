"""A call recorded in a CUDA graph, for tests that replay it."""

from collections.abc import Callable
from typing import TypeVar

import torch

from gbla_kernels.testing.attention_subject import Results, Tensors, assert_same_bits

T = TypeVar("T")


def capture(call: Callable[[], T]) -> tuple[T, Callable[[], None]]:
    """What a call returned while it was recorded, and a function that replays it: fills that anew, and waits until it is there."""
    # on a side stream first: what compiles or makes handles may not be captured
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()

    def replay() -> None:
        graph.replay()
        torch.cuda.synchronize()

    return captured, replay


def assert_replays(call: Callable[[Tensors], Results], first: Tensors, second: Tensors) -> None:
    """A captured ``call`` gives what a call gives, for new values in the same memory, and for the old ones again."""
    static = {name: x.clone() for name, x in first.items()}
    captured, replay = capture(lambda: call(static))
    for tensors in (second, first):
        for name, x in tensors.items():
            static[name].copy_(x)
        replay()
        assert_same_bits(captured, call(tensors))
