"""``gbla-rec recommend``: the next items for a user of the dataset, for a history typed in, or for all users, into a file."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gbla_apps import command_line
from gbla_apps.endings import is_first_rank
from gbla_apps.shared_options import shared_options
from gbla_rec.checkpoint.process_group import process_group
from gbla_rec.checkpoint.run_directory import describe_run
from gbla_rec.evaluation.rank import Score
from gbla_rec.evaluation.recommend import Recommendation, Recommender
from gbla_rec.evaluation.recommend_to_all import recommend_to_all, require_parquet_name


def main(arguments: Sequence[str]) -> None:
    """Parse and recommend."""
    parser = argparse.ArgumentParser(prog="gbla-rec recommend", description="Recommend items with titles.")
    command_line.add_run_options(parser)
    history = parser.add_mutually_exclusive_group(required=True)
    history.add_argument("--user", metavar="ID", help="a user of the dataset, whole history")
    history.add_argument("--history", metavar="ITEMS", help='titles or ids, oldest first, separated by commas: "Toy Story, Heat, 1270"')
    history.add_argument("--all-users", type=Path, metavar="FILE", help="all users of the dataset, into this new .parquet file")
    parser.add_argument("--count", type=int, default=10, metavar="N", help="items of a user (default: 10)")
    parser.add_argument("--repeat", action="store_true", help="allow items of the history")
    parser.add_argument("--score", choices=get_args(Score), help="what ranks the items (default: the model's main score)")
    with shared_options():
        options = parser.parse_args(arguments)
        if options.count < 1:
            raise ValueError(f"--count must be at least 1, got {options.count}")
        if options.all_users is not None:
            require_parquet_name(options.all_users)
    run_dir = command_line.chosen_run(options)
    command_line.print_once(describe_run(run_dir))
    with process_group() as device:
        recommender = Recommender.open(run_dir, device, options.score)
        if options.all_users is not None:
            without = not options.repeat
            num_users = recommend_to_all(recommender, options.all_users, options.count, exclude_history=without, said=say_so_far)
            command_line.print_once(f"written to {options.all_users}: {num_users:,} users")
            return
        if options.user is not None:
            recommendation = recommender.for_user(options.user, options.count, exclude_history=not options.repeat)
        else:
            recommendation = recommender.for_history(options.history, options.count, exclude_history=not options.repeat)
    if is_first_rank():
        show(recommendation)


def say_so_far(num_users: int) -> None:
    """Print how many users are done."""
    print(f"{num_users:,} users", flush=True)


def show(recommendation: Recommendation) -> None:
    """Print the end of the history and the recommended items."""
    console = Console()
    # Text and markup=False: rich would take "[new]" in a title for markup
    console.print("history, newest last: " + " · ".join(recommendation.history_titles[-5:]), highlight=False, markup=False)
    table = Table(
        "rank", "item", "title", "log-probability" if recommendation.ranked_by == "generative" else f"{recommendation.ranked_by} score"
    )
    for rank, (item, title, score) in enumerate(zip(recommendation.item_ids, recommendation.titles, recommendation.scores, strict=True), 1):
        table.add_row(str(rank), Text(str(item)), Text(title), f"{score:.2f}")
    console.print(table)


if __name__ == "__main__":
    command_line.run(main, sys.argv[1:])
