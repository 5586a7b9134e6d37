"""Python's cyclic garbage collector, held back to steps at which all ranks wait for each other anyway."""

import gc
from types import TracebackType

YOUNG_EVERY = 100
"""Steps between collections of young objects, which take milliseconds."""


class ScheduledCollection:
    """No collection of Python's own choosing while a run trains: every rank collects after the same steps.

    A full collection walks every object of the process: with the remains of ``torch.compile`` some half a second and more. Left to itself
    it comes to each rank at a moment of its own, and all others wait in the next exchange; among a thousand ranks one is always late.
    Cycles that die young are freed every ``YOUNG_EVERY`` steps, all others by ``collect``, where a run stops to save.
    """

    def __enter__(self) -> "ScheduledCollection":
        self.was_enabled = gc.isenabled()
        gc.collect()
        gc.disable()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.was_enabled:
            gc.enable()

    def after_step(self, step: int) -> None:
        """Free young cycles if it is time for that."""
        if step % YOUNG_EVERY == 0:
            gc.collect(1)

    def collect(self) -> None:
        """Free all cycles."""
        gc.collect()
