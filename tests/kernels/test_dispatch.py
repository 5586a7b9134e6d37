"""Kernels are launched with the device of their tensors as the current one; a GPU that is too small for one is told apart and named."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton

from gbla_kernels import dispatch
from gbla_kernels.causal_conv1d.forward import causal_conv1d_forward_kernel
from gbla_kernels.cross_attention.forward import attention_kernel
from gbla_kernels.keyed_dropout.forward import keyed_dropout_kernel
from gbla_kernels.linear_attention.output import output_kernel
from gbla_kernels.rotary.forward import rotary_kernel

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


NARROWER = ", or use narrower heads (K, V <= 64)"


@pytest.mark.parametrize("launcher", [dispatch.launch, dispatch.traced_launch])
@pytest.mark.parametrize(
    ("op", "kernel", "narrower"),
    [
        ("linear_attention", output_kernel, NARROWER),
        ("cross_attention", attention_kernel, NARROWER),
        ("causal_conv1d", causal_conv1d_forward_kernel, ""),
        ("rotary", rotary_kernel, ""),
        ("keyed_dropout", keyed_dropout_kernel, ""),
    ],
)
def test_a_kernel_too_large_for_the_gpu_is_named_with_the_cure(
    monkeypatch: pytest.MonkeyPatch, launcher: dispatch.Launcher, op: str, kernel: Any, narrower: str
) -> None:
    class Kernel(dict):  # type: ignore[type-arg]
        fn = kernel.fn

    def run(first: torch.Tensor, **options: object) -> None:
        # what Triton raised for the output kernel, K = 128, on compute capability 8.6 and 8.9, by what it compiled for them
        raise triton.OutOfResources(118_784, 101_376, "shared memory")

    # no compiler wraps the stub
    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(NotImplementedError) as raised:
        launcher(Kernel({(5,): run}), (5,))(torch.zeros(3), BLOCK=16)
    assert str(raised.value) == (
        f"{op}: {kernel.fn.__name__} needs 118,784 bytes of shared memory, and this GPU allows a program 101,376; "
        f"pass backend=Backend.REFERENCE{narrower}"
    )
    assert isinstance(raised.value.__cause__, triton.OutOfResources)


def test_other_errors_of_a_launch_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(first: torch.Tensor) -> None:
        raise RuntimeError("an illegal memory access")

    monkeypatch.setattr(dispatch, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        dispatch.launch({(5,): run}, (5,))(torch.zeros(3))
