"""What is recorded in a CUDA graph has run before, on a stream that the caller's waits for: stubs in place of CUDA."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gbla_kernels.testing.cuda_graph import capture


def test_a_call_is_warm_before_its_capture_and_a_replay_is_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    places = ["current"]

    class Stream:
        def __init__(self, name: str = "side") -> None:
            self.name = name

        def wait_stream(self, other: "Stream") -> None:
            log.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    @contextmanager
    def inside(place: Stream | Graph) -> Iterator[None]:
        places.append(place.name if isinstance(place, Stream) else "graph")
        yield
        places.pop()

    def call() -> int:
        log.append(f"call in {places[-1]}")
        return len(log)

    stubs = {"Stream": Stream, "current_stream": lambda: Stream("current"), "stream": inside, "CUDAGraph": Graph, "graph": inside}
    for name, stub in {**stubs, "synchronize": lambda: log.append("synchronize")}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    captured, replay = capture(call)
    before = ["side waits for current", "call in side", "current waits for side", "call in graph"]
    assert log == before and captured == len(before), "what the second call returned"
    replay()
    replay()
    assert log == before + ["replay", "synchronize"] * 2
