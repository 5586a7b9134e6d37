"""Calls that wait for the GPU, for tests of calls that must not."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def synchronisations_raise() -> Iterator[None]:
    """Whatever waits for the GPU raises RuntimeError in this block."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
