"""While a run trains, Python's collector runs on all ranks after the same steps, and at no other time."""

import gc
import weakref
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gbla_rec.config import RunConfig
from gbla_rec.training import garbage_collection
from gbla_rec.training.garbage_collection import ScheduledCollection

YOUNG, FULL = 1, 2


class Node:
    """Refers to itself: a cycle that no reference count frees."""

    def __init__(self) -> None:
        self.itself = self


class Recorded(ScheduledCollection):
    """Keeps the generations that are collected in a run, in a process that would collect all the time."""

    found: ClassVar[list[int]] = []

    def __enter__(self) -> ScheduledCollection:
        gc.callbacks.append(self.record)
        entered = super().__enter__()
        gc.set_threshold(20, 2, 2)
        return entered

    def __exit__(self, *error: Any) -> None:
        gc.callbacks.remove(self.record)
        super().__exit__(*error)

    @classmethod
    def record(cls, phase: str, info: dict[str, int]) -> None:
        if phase == "stop":
            cls.found.append(info["generation"])


def collections_of_a_run(rank: int, world_size: int, config: RunConfig) -> list[int]:
    from gbla_rec.training import trainer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "ScheduledCollection", Recorded)
        patch.setattr(garbage_collection, "YOUNG_EVERY", 4)
        trainer.train(config, device=torch.device("cpu"))
    assert gc.isenabled()
    return Recorded.found


@pytest.mark.timeout(60)
def test_ranks_collect_after_the_same_steps_and_never_else(run_ranks: Any, tiny_run: Any, tiny_workspace: Path) -> None:
    # 6 steps, stops at 2, 3, 4 and 6
    first, second = run_ranks(collections_of_a_run, 2, tiny_run())
    assert first == second == [FULL, FULL, FULL, YOUNG, FULL, FULL]


def test_cycles_are_freed_and_the_collector_comes_back() -> None:
    old, young = Node(), Node()
    references = weakref.ref(old), weakref.ref(young)
    with pytest.raises(KeyError), ScheduledCollection() as garbage:
        assert not gc.isenabled()
        del old, young
        held = Node()
        references = (*references, weakref.ref(held))
        garbage.after_step(garbage_collection.YOUNG_EVERY - 1)
        assert references[2]() is not None
        garbage.after_step(garbage_collection.YOUNG_EVERY)
        del held
        after_death = references[2]()
        assert after_death is not None
        del after_death
        garbage.collect()
        assert [reference() for reference in references] == [None] * 3
        raise KeyError
    assert gc.isenabled()
