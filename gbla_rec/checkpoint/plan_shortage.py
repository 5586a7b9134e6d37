"""Why no plan fits, or none in device memory alone: by how many bytes a rank, and what to change."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.types import ShardingOption, Storage

from gbla_rec.checkpoint.plan_search import PlanRequest, search_plan
from gbla_rec.config import Placement, Sharding, exact_bytes, format_bytes

UNLIMITED = 1 << 60
"""Bytes; a search with so much memory shows what is needed."""
MAX_RANK_FACTOR = 64
"""How many times more ranks are tried."""
ROW_ALIGNMENT = 4
"""fbgemm's kernels want the width of a row to be a multiple of this."""


@dataclass(frozen=True)
class Need:
    """What the fullest rank needs where all tables get one placement and one sharding type, and what it has.

    Attributes:
        placement: where rows lie.
        sharding: how tables are cut.
        used: TorchRec's estimate for the rank.
        free: what the reserve leaves of its memory.
    """

    placement: Placement
    sharding: Sharding
    used: Storage
    free: Storage

    @property
    def short(self) -> Storage:
        """Bytes that are missing; 0 where there is enough."""
        return Storage(hbm=max(0, self.used.hbm - self.free.hbm), ddr=max(0, self.used.ddr - self.free.ddr), ssd=0)

    @property
    def fits(self) -> bool:
        """Whether nothing is missing."""
        return self.short.hbm == self.short.ddr == 0


def rank_storages(options: Sequence[ShardingOption], world_size: int) -> list[Storage]:
    """The planner's estimate for each rank, summed over the shards it holds."""
    storages = [Storage(hbm=0, ddr=0, ssd=0) for _ in range(world_size)]
    for option in options:
        for shard in option.shards:
            assert shard.rank is not None and shard.storage is not None
            storages[shard.rank] += shard.storage
    return storages


def describe_shortage(request: PlanRequest) -> str:
    """The message for a request that no plan fits."""
    cluster, embedding = request.cluster, request.embedding
    needs = [_least_need(request, placement) for placement in _placements(request)]
    lines = [f"the tables do not fit on {cluster.world_size} {cluster.device_type} rank(s). On the fullest one:"]
    lines += [f"  {_describe(need, embedding.memory_reserve)}" for need in needs]
    lines.append("change one of these (for a trained run, in its config.json):")
    lines += [f"  - {cure}" for cure in _cures(request, needs)]
    return "\n".join(lines)


def device_memory_cures(request: PlanRequest) -> list[str]:
    """What would let device memory hold all tables of a CUDA request that was planned with some of them in host memory."""
    request = dataclasses.replace(request, embedding=dataclasses.replace(request.embedding, placement="hbm"))
    need = _least_need(request, "hbm")
    if need.fits:
        # the search takes what it estimates to be fastest, and may have missed it
        return [f"a plan that fits: --model.embedding.placement hbm --model.embedding.sharding {need.sharding}"]
    return [*_reserve_cure(request, need), *_rank_cures(request, [need]), *_size_cures(request, need)]


def _placements(request: PlanRequest) -> list[Placement]:
    """Those that the request allows, the fastest first."""
    if request.embedding.placement != "auto":
        return [request.embedding.placement]
    return ["hbm"] if request.cluster.device_type == "cpu" else ["hbm", "uvm_caching", "uvm"]


def _least_need(request: PlanRequest, placement: Placement) -> Need:
    """The sharding type of the request that needs least, found by a search with unlimited memory."""
    return min((_need(request, placement, sharding) for sharding in _shardings(request)), key=_excess)


def _shardings(request: PlanRequest) -> list[Sharding]:
    if request.embedding.sharding != "auto":
        return [request.embedding.sharding]
    return ["row_wise", "table_wise"]


def _need(request: PlanRequest, placement: Placement, sharding: Sharding) -> Need:
    cluster, reserve = request.cluster, request.embedding.memory_reserve
    unlimited = dataclasses.replace(
        cluster,
        device_memory=UNLIMITED if cluster.device_type == "cuda" else 0,
        host_memory=UNLIMITED * cluster.ranks_per_node,
    )
    embedding = dataclasses.replace(request.embedding, placement=placement, sharding=sharding)
    _, options = search_plan(dataclasses.replace(request, cluster=unlimited, embedding=embedding))
    storages = rank_storages(options, cluster.world_size)
    used = Storage(hbm=max(storage.hbm for storage in storages), ddr=max(storage.ddr for storage in storages), ssd=0)
    free = Storage(hbm=int((1 - reserve) * cluster.device_memory), ddr=int((1 - reserve) * cluster.host_memory_per_rank), ssd=0)
    return Need(placement, sharding, used, free)


def _excess(need: Need) -> tuple[int, int]:
    return (need.short.hbm + need.short.ddr, need.used.hbm + need.used.ddr)


def _describe(need: Need, reserve: float) -> str:
    parts = []
    for name, used, free, short in (
        ("device memory", need.used.hbm, need.free.hbm, need.short.hbm),
        ("host memory", need.used.ddr, need.free.ddr, need.short.ddr),
    ):
        if used:
            verdict = f"short by {exact_bytes(short)}" if short else "enough"
            parts.append(f"{format_bytes(used)} of {name} needed, {format_bytes(free)} free beside a reserve of {reserve:.0%}: {verdict}")
    return f"placement {need.placement}, {need.sharding}: {'; '.join(parts)}"


def _cures(request: PlanRequest, needs: Sequence[Need]) -> Iterator[str]:
    best = min(needs, key=_excess)
    yield from _rank_cures(request, needs)
    yield from _size_cures(request, best)
    yield from _placement_cures(request, needs)
    yield from _reserve_cure(request, best)


def _size_cures(request: PlanRequest, best: Need) -> Iterator[str]:
    """Tables that are cut finer, have fewer rows, or narrower ones."""
    embedding = request.embedding
    if best.sharding != "row_wise":
        yield "--model.embedding.sharding row_wise: each table is then spread over all ranks"
    share = _share(best, Storage(hbm=0, ddr=0, ssd=0))
    rows = int(embedding.rows_per_table * _share(best, _exchange(request, best))) - request.cluster.world_size
    if rows > 0 and embedding.reads_item_ids:
        yield f"fewer rows: --model.embedding.rows-per-table {rows} or less"
    # a row comes with a moment, and a token with an id: as much as two columns
    width = int((embedding.dim + 2) * share - 2) // ROW_ALIGNMENT * ROW_ALIGNMENT
    if width > 0:
        yield f"narrower rows: --model.embedding.dim {width} or less"


def _reserve_cure(request: PlanRequest, best: Need) -> Iterator[str]:
    reserve = 1 - (1 - request.embedding.memory_reserve) / _share(best, Storage(hbm=0, ddr=0, ssd=0))
    thousandths = int(reserve * 1000)
    if thousandths > 0:
        option = f"--model.embedding.memory-reserve {thousandths / 1000} or less"
        yield f"a lower reserve, if the dense part and the activations leave room: {option}"


def _share(need: Need, fixed: Storage) -> float:
    """The fraction of what is needed beside ``fixed`` that is free."""
    pairs = ((need.used.hbm, need.free.hbm, fixed.hbm), (need.used.ddr, need.free.ddr, fixed.ddr))
    return min((free - own) / (used - own) for used, free, own in pairs if used > own)


def _exchange(request: PlanRequest, need: Need) -> Storage:
    """What the need owes to the tokens: as much as twice the tokens would add."""
    doubled = _need(dataclasses.replace(request, lookups_per_batch=2 * request.lookups_per_batch), need.placement, need.sharding)
    return Storage(hbm=doubled.used.hbm - need.used.hbm, ddr=doubled.used.ddr - need.used.ddr, ssd=0)


def _rank_cures(request: PlanRequest, needs: Sequence[Need]) -> Iterator[str]:
    """How many ranks have room for the same budget; a slower placement only if it needs fewer."""
    limit = request.cluster.world_size * MAX_RANK_FACTOR
    for need in needs:
        ranks = _enough_ranks(request, need, limit)
        if ranks is not None:
            yield f"more ranks: {ranks} are enough (placement {need.placement}, {need.sharding}, the same token budget)"
            limit = ranks // 2


def _enough_ranks(request: PlanRequest, need: Need, limit: int) -> int | None:
    """The fewest ranks, by doubling, up to ``limit``."""
    ranks = 2 * request.cluster.world_size
    while ranks <= limit:
        cluster = dataclasses.replace(request.cluster, world_size=ranks)
        if _need(dataclasses.replace(request, cluster=cluster), need.placement, need.sharding).fits:
            return ranks
        ranks *= 2
    return None


def _placement_cures(request: PlanRequest, needs: Sequence[Need]) -> Iterator[str]:
    if request.cluster.device_type == "cpu":
        return
    tried = {need.placement for need in needs}
    for placement in ("uvm_caching", "uvm"):
        if placement in tried:
            continue
        need = _least_need(request, placement)
        if need.fits:
            yield (
                f"rows in host memory: --model.embedding.placement {placement} fits, with {format_bytes(need.used.hbm)} of device memory "
                f"and {format_bytes(need.used.ddr)} of host memory a rank"
            )
