"""``gbla-rec plan``: how a run's tables would be sharded on a cluster, and what that costs, without having the cluster."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from gbla_apps import command_line
from gbla_apps.run_config_options import parse_run_config
from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.cluster_plan import plan_cluster
from gbla_rec.checkpoint.cluster_plan_text import describe_cluster_plan
from gbla_rec.checkpoint.known_catalogue import known_catalogue
from gbla_rec.config import parse_bytes

DESCRIPTION = "Plan the tables of a run on a cluster that need not be there: shards, memory of the ranks, network, checkpoints."


def main(arguments: Sequence[str]) -> None:
    """Parse, plan and print."""
    parser = cluster_options()
    options, rest = parser.parse_known_args(arguments)
    if "-h" in rest or "--help" in rest:
        print(f"{parser.format_help()}\nand the options of a run:\n")
    config = parse_run_config("plan", DESCRIPTION, rest)
    # before the planner, which may take a while
    write_rate = parse_bytes(options.write_rate, "--write-rate")
    catalogue, source = known_catalogue(config, options.items)
    plan = plan_cluster(config, cluster_of(options), catalogue)
    if options.json:
        print(json.dumps({"catalogue": dataclasses.asdict(catalogue), **dataclasses.asdict(plan)}, indent=2))
        return
    print(f"{source}\n{describe_cluster_plan(plan, write_rate=write_rate)}")


def cluster_options() -> argparse.ArgumentParser:
    """The options that describe the cluster; those of the run come on top."""
    parser = argparse.ArgumentParser(prog="gbla-rec plan", description=DESCRIPTION, add_help=False, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1, help="nodes of the cluster (default: 1)")
    parser.add_argument("--gpus", type=int, default=8, help="ranks of a node, one a GPU (default: 8)")
    parser.add_argument("--hbm", default="80GB", metavar="SIZE", help="memory of one GPU (default: 80GB)")
    parser.add_argument("--host-memory", default="2TB", metavar="SIZE", help="memory of one node (default: 2TB)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: tables lie in host memory (default: cuda)")
    parser.add_argument("--items", type=int, help="items of the catalogue (default: of the prepared dataset, or rows_per_table)")
    parser.add_argument("--write-rate", default="1GB", metavar="SIZE", help="bytes a second that a rank writes (default: 1GB)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, in bytes")
    return parser


def cluster_of(options: argparse.Namespace) -> Cluster:
    """The cluster that the options describe."""
    for name in ("nodes", "gpus", "items"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be positive, got {value}")
    return Cluster(
        device_type=options.device,
        world_size=options.nodes * options.gpus,
        ranks_per_node=options.gpus,
        device_memory=parse_bytes(options.hbm, "--hbm") if options.device == "cuda" else 0,
        host_memory=parse_bytes(options.host_memory, "--host-memory"),
    )


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
