"""A cluster plan as text."""

from gbla_rec.checkpoint.cluster_plan import ClusterPlan, TableSummary
from gbla_rec.checkpoint.host_placement import describe_host_placement
from gbla_rec.checkpoint.table_plan import MemoryPart
from gbla_rec.config import format_bytes


def describe_cluster_plan(plan: ClusterPlan, *, write_rate: int) -> str:
    """The plan for a reader.

    Args:
        plan: what to tell.
        write_rate: bytes a second that one rank writes, from which the time of a save is computed.
    """
    parts = (
        _cluster(plan),
        _tables(plan),
        _host_placement(plan),
        _memory(plan),
        _exchange(plan),
        _checkpoint(plan, write_rate),
        _planning(plan),
    )
    return "\n\n".join("\n".join(part) for part in parts if part)


def _cluster(plan: ClusterPlan) -> list[str]:
    cluster = plan.cluster
    device = f"{format_bytes(cluster.device_memory)} of device memory and " if cluster.device_memory else ""
    return [
        f"{cluster.world_size} {cluster.device_type} ranks on {cluster.num_nodes} node(s); "
        f"{device}{format_bytes(cluster.host_memory_per_rank)} of host memory a rank",
        f"{plan.tokens_per_batch:,} tokens a step, {plan.tokens_per_rank:,} a rank",
    ]


def _tables(plan: ClusterPlan) -> list[str]:
    header = ("table", "rows", "dim", "sharding", "kernel", "shards", "a rank", "largest shard")
    lines = [header, *(_table(table) for table in plan.tables)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _table(table: TableSummary) -> tuple[str, ...]:
    fewest, most = table.shards_per_rank
    rows, columns = table.largest_shard
    per_rank = str(most) if fewest == most else f"{fewest} to {most}"
    return (
        table.name,
        f"{table.rows:,}",
        str(table.dim),
        table.sharding,
        table.kernel,
        f"{table.shards:,}",
        per_rank,
        f"{rows:,} x {columns}",
    )


def _host_placement(plan: ClusterPlan) -> list[str]:
    return [] if plan.host_placement is None else [describe_host_placement(plan.host_placement)]


def _memory(plan: ClusterPlan) -> list[str]:
    full, cluster, dense = plan.fullest_rank, plan.cluster, plan.dense
    is_cuda = cluster.device_type == "cuda"
    device_reserve = int(plan.memory_reserve * cluster.device_memory)
    host_reserve = int(plan.memory_reserve * cluster.host_memory_per_rank)
    lines = [f"{'memory of the fullest rank':<44} {'device':>10} {'host':>10}"]
    lines += [
        _memory_line("table rows (TorchRec's estimate)", full.rows),
        _memory_line("optimiser and cache state (TorchRec's)", full.optimizer),
        _memory_line("exchange of ids and rows (TorchRec's)", full.exchange),
        _memory_line(f"reserve, {plan.memory_reserve:.0%}", MemoryPart(device_reserve, host_reserve)),
        _memory_line(
            "free",
            MemoryPart(cluster.device_memory - device_reserve - full.device, cluster.host_memory_per_rank - host_reserve - full.host),
        ),
    ]
    lines.append(
        f"the emptiest rank: {format_bytes(plan.emptiest_rank.device if is_cuda else plan.emptiest_rank.host)} of tables and exchange"
    )
    left = (device_reserve if is_cuda else host_reserve) - dense.device
    lines += [
        "held in the reserve by every rank (our own number)",
        f"  weights {format_bytes(dense.weights)}, gradients and DDP's buckets {format_bytes(dense.gradients)}, "
        f"AdamW {format_bytes(dense.optimizer)}, semantic IDs and features of items {format_bytes(dense.item_codes)}",
        f"  {format_bytes(left)} left for activations and libraries; on the host, table rows of items {format_bytes(dense.hash_rows_host)}",
    ]
    return lines


def _memory_line(name: str, part: MemoryPart) -> str:
    return f"  {name:<42} {format_bytes(part.device):>10} {format_bytes(part.host):>10}"


def _exchange(plan: ClusterPlan) -> list[str]:
    exchange, ranks = plan.exchange, plan.cluster.world_size
    return [
        "all-to-all of a step, at most (our own number, from the token budget)",
        f"  all ranks: ids {format_bytes(exchange.ids)}, rows {format_bytes(exchange.rows)} forward, "
        f"gradients {format_bytes(exchange.rows)} backward",
        f"  of it {exchange.leaving_rank:.1%} leaves its rank, {exchange.leaving_node:.1%} its node",
        f"  a rank: {format_bytes(exchange.total / ranks)} in all; the busiest one sends {format_bytes(exchange.busiest_rank)} of rows",
        f"  all-reduce of dense gradients: {format_bytes(exchange.dense_all_reduce)} a rank",
    ]


def _checkpoint(plan: ClusterPlan, write_rate: int) -> list[str]:
    size = plan.checkpoint
    return [
        f"checkpoint (our own number): {format_bytes(size.total)}",
        f"  table rows {format_bytes(size.table_rows)}, their optimiser {format_bytes(size.table_optimizer)}, "
        f"dense {format_bytes(size.dense)}",
        f"  {size.data_files:,} data files and .metadata of {format_bytes(size.metadata)}",
        f"  the largest rank writes {format_bytes(size.largest_rank)}: {size.largest_rank / write_rate:,.1f} s "
        f"at {format_bytes(write_rate)}/s",
    ]


def _planning(plan: ClusterPlan) -> list[str]:
    return [f"planned in {plan.planning_seconds:.1f} s of CPU time, peak memory of this process {format_bytes(plan.planning_memory)}"]
