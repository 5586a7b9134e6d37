"""The time of NCCL's kernels on several ranks, divided into transfer and waiting for the others."""

from typing import Any

Collective = tuple[str, float]
"""Kind (``all-to-all`` or ``all-reduce``) and seconds of a kernel."""


def collectives(events: list[dict[str, Any]]) -> list[Collective]:
    """NCCL's kernels of one rank by the time of their start, from the events of a trace."""
    kernels = [event for event in events if event.get("cat") == "kernel" and "nccl" in event["name"].lower()]
    kernels.sort(key=lambda event: event["ts"])
    return [("all-reduce" if "AllReduce" in event["name"] else "all-to-all", event["dur"] / 1e6) for event in kernels]


def transfer_and_waiting(ranks: list[list[Collective]]) -> list[dict[str, float]]:
    """Seconds of each rank in ``all-to-all``, ``all-reduce`` (the transfers alone) and ``waiting``.

    A kernel that starts early spins until the last rank has come: the k-th collective of a kind lasts on the last rank as long as its
    transfer, so the shortest of the ranks is the transfer and what a rank takes longer is waiting.

    Args:
        ranks: ``collectives`` of each rank, over the same steps.

    Returns:
        One dict a rank.

    Raises:
        ValueError: if the ranks do not have the same number of kernels of a kind.
    """
    seconds = [{kind: [spent for name, spent in rank if name == kind] for kind in ("all-to-all", "all-reduce")} for rank in ranks]
    divided = [{"all-to-all": 0.0, "all-reduce": 0.0, "waiting": 0.0} for _ in ranks]
    for kind in ("all-to-all", "all-reduce"):
        counts = [len(rank[kind]) for rank in seconds]
        if len(set(counts)) > 1:
            raise ValueError(f"all ranks must have the same number of {kind} kernels, got {counts}; profile the same steps on all")
        for same in zip(*(rank[kind] for rank in seconds), strict=True):
            for shares, spent in zip(divided, same, strict=True):
                shares[kind] += min(same)
                shares["waiting"] += spent - min(same)
    return divided
