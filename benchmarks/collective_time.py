"""The time of NCCL's kernels on several ranks, divided into transfer and waiting for the others."""

from typing import Any

Collective = tuple[str, float]
"""Kind and seconds of a kernel."""
KINDS = ("all-to-all", "all-reduce")
"""Sends and receives, and everything else that is not a reduction to all, count as ``all-to-all``."""


def collectives(events: list[dict[str, Any]]) -> list[Collective]:
    """NCCL's kernels of one rank by the time of their start, from the events of a trace."""
    kernels = [event for event in events if event.get("cat") == "kernel" and "nccl" in event["name"].lower()]
    kernels.sort(key=lambda event: event["ts"])
    return [("all-reduce" if "AllReduce" in event["name"] else "all-to-all", event["dur"] / 1e6) for event in kernels]


def transfer_and_waiting(ranks: list[list[Collective]]) -> list[dict[str, float | None]]:
    """Seconds of each rank in ``all-to-all``, ``all-reduce`` (the transfers alone) and ``waiting``.

    A kernel that starts early spins until the last rank has come: the k-th collective of a kind lasts on the last rank as long as its
    transfer, so the shortest of the ranks is the transfer and what a rank takes longer is waiting.

    Args:
        ranks: ``collectives`` of each rank, over the same steps.

    Returns:
        One dict a rank. If the ranks do not have the same number of kernels of each kind, their kernels cannot be paired: ``waiting``
        is None, and is part of the other two.
    """
    seconds = [{kind: [spent for name, spent in rank if name == kind] for kind in KINDS} for rank in ranks]
    if any(len({len(rank[kind]) for rank in seconds}) > 1 for kind in KINDS):
        return [{**{kind: sum(rank[kind]) for kind in KINDS}, "waiting": None} for rank in seconds]
    transfers = {kind: sum(map(min, zip(*(rank[kind] for rank in seconds), strict=True))) for kind in KINDS}
    return [{**transfers, "waiting": sum(sum(rank[kind]) - transfers[kind] for kind in KINDS)} for rank in seconds]
