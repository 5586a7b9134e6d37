"""A call recorded in a CUDA graph, for tests that replay it."""

from collections.abc import Callable
from typing import TypeVar

import torch

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
