"""Kernels are launched with the device of their tensors as the current one."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from gbla_kernels import dispatch

CURRENT = 0


@pytest.mark.parametrize(("device", "switches"), [(CURRENT, []), (1, [1])], ids=["current", "another"])
def test_a_launch_runs_on_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch, device: int, switches: list[int]) -> None:
    current, launched = [CURRENT], []

    @contextmanager
    def switch(there: int) -> Iterator[None]:
        current.append(there)
        yield
        current.append(CURRENT)

    x = torch.zeros(3)
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: device)
    kernel = {(5,): lambda first, *rest, **options: launched.append((current[-1], first, rest, options))}
    dispatch.launch(kernel, (5,))(x, 7, BLOCK=16)
    ((where, first, rest, options),) = launched
    assert where == device and first is x and (rest, options) == ((7,), {"BLOCK": 16})
    assert current == [CURRENT, *switches, *[CURRENT] * len(switches)], "the caller's device is the current one again"
