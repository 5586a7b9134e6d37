"""Full-catalogue evaluation of a run: beams on the shortlisted checkpoints, test at the best one, baselines beside it."""

# U users, R results per user (docs/shapes.md)

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import RESULTS, Checkpoint, best_checkpoints, code_version, read_config, write_text
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.config import EvaluationConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import evaluation_batches
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.data.stream import iterate_train_items
from gbla_rec.evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval
from gbla_rec.evaluation.metrics import ndcg_at_k, recall_at_k
from gbla_rec.evaluation.table import results_markdown
from gbla_rec.models.baselines import ItemKNN, MostPopular
from gbla_rec.retrieval.generate import generate_items
from gbla_rec.semantic_ids.trie import PrefixTrie

RESULTS_TABLE = "results.md"
SHORTLIST_CUTOFF = 10
"""Checkpoints are chosen by validation Recall at this cutoff, or at the largest one that is evaluated."""
Ranker = Callable[[HistoryBatch], NDArray[np.int64]]
Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class RankedUsers:
    """Rankings ``(U, R)`` (-1 where fewer exist) and jagged targets of users in the dataset's order."""

    user_rows: Int64Array
    ranked: Int64Array
    targets: Int64Array
    target_offsets: Int64Array

    def metrics(self, cutoffs: tuple[int, ...]) -> dict[str, NDArray[np.float64]]:
        """Per-user ``Recall@k`` and ``NDCG@k``, ``(U,)`` each."""
        scores = {f"Recall@{k}": recall_at_k(self.ranked, self.targets, self.target_offsets, k) for k in cutoffs}
        return scores | {f"NDCG@{k}": ndcg_at_k(self.ranked, self.targets, self.target_offsets, k) for k in cutoffs}


def rank_with_model(parts: RunParts, trie: PrefixTrie, split: Literal["validation", "test"], num_users: int | None = None) -> RankedUsers:
    """Beam-search every user of ``split``; all ranks call it together and all get the whole result."""
    config = parts.config.evaluation
    num_results = max(config.cutoffs)
    parts.model.eval()
    found: list[RankedUsers] = []
    for histories, batch in parts.evaluation_batches(split, config.tokens_per_batch, num_users):
        # every rank encodes, empty batch or not: the sharded tables need all ranks
        with parts.autocast():
            memory = parts.retriever.encode(batch)
            if len(histories.user_rows) == 0:
                continue
            result = generate_items(
                parts.retriever,
                memory,
                trie,
                num_beams=config.num_beams,
                num_results=num_results,
                denied_items=torch.from_numpy(histories.seen_items).to(parts.device) if config.exclude_history else None,
                denied_offsets=torch.from_numpy(histories.seen_offsets).to(parts.device) if config.exclude_history else None,
            )
        found.append(_ranked(histories, result.items.cpu().numpy()))
    gathered: list[list[RankedUsers]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, found)
    return _in_user_order([part for rank in gathered for part in rank], num_results)


def rank_with_baseline(
    dataset: PreparedDataset, split: Literal["validation", "test"], ranker: Ranker, num_results: int, num_users: int | None, seed: int
) -> RankedUsers:
    """Rank every user of ``split`` with ``ranker``, which sees the user's whole history before the targets."""
    batches = evaluation_batches(dataset, split, tokens_per_batch=1_000_000, max_history_length=1, num_users=num_users, seed=seed)
    return _in_user_order([_ranked(histories, ranker(histories)) for histories in batches], num_results)


def _ranked(histories: HistoryBatch, ranked: Int64Array) -> RankedUsers:
    # without the histories: the parts travel to every rank
    return RankedUsers(histories.user_rows, ranked, histories.targets, histories.target_offsets)


def _in_user_order(parts: list[RankedUsers], num_results: int) -> RankedUsers:
    """One table of all parts, users in the dataset's order."""
    user_rows = np.concatenate([np.zeros(0, np.int64), *(part.user_rows for part in parts)])
    ranked = np.concatenate([np.zeros((0, num_results), np.int64), *(part.ranked for part in parts)])
    targets = [row for part in parts if len(part.user_rows) for row in np.split(part.targets, part.target_offsets[1:-1])]
    order = np.argsort(user_rows, kind="stable")
    ordered_targets = [targets[i] for i in order]
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in ordered_targets])]).astype(np.int64)
    return RankedUsers(user_rows[order], ranked[order], np.concatenate([np.zeros(0, np.int64), *ordered_targets]), offsets)


def choose_checkpoint(parts: RunParts, run_dir: Path, trie: PrefixTrie) -> tuple[Checkpoint, dict[str, float]]:
    """The shortlisted checkpoint of the best validation recall by beam search; its weights are loaded when this returns.

    Returns:
        The checkpoint and the recall of every shortlisted one by directory name.
    """
    cutoff = min(SHORTLIST_CUTOFF, max(parts.config.evaluation.cutoffs))
    # one list for all ranks: a run that still trains may save and prune meanwhile
    shortlist = on_first_rank(lambda: best_checkpoints(run_dir, parts.config.training.keep_best))
    recalls: dict[str, float] = {}
    for checkpoint in shortlist:
        load_checkpoint(checkpoint, parts.model, None)
        ranked = rank_with_model(parts, trie, "validation", parts.config.evaluation.shortlist_users)
        per_user = recall_at_k(ranked.ranked, ranked.targets, ranked.target_offsets, cutoff)
        recalls[checkpoint.path.name] = float(per_user.mean()) if len(per_user) else 0.0
    best = max(shortlist, key=lambda checkpoint: recalls[checkpoint.path.name])
    load_checkpoint(best, parts.model, None)
    return best, recalls


def evaluate(run_dir: Path, *, device: torch.device) -> dict[str, Any]:
    """Evaluate a run on its test split and write ``results.json`` and ``results.md`` into its directory; all ranks call it together.

    The baselines are fitted on the same training events and obey the same ``exclude_history``.

    Returns:
        What ``results.json`` holds: protocol, versions, and per method and metric the mean with a 95 % bootstrap interval.
    """
    config = read_config(run_dir)
    parts = RunParts.open(config, device)
    trie = PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths).to(device)
    best, shortlist = choose_checkpoint(parts, run_dir, trie)
    model = rank_with_model(parts, trie, "test")

    def write_results() -> dict[str, Any]:
        rankings = {config.name: model} | _rank_baselines(parts.dataset, config.evaluation, config.seed)
        results = {
            "run": str(run_dir),
            "checkpoint": best.path.name,
            "shortlist_validation_recall": shortlist,
            "dataset": {"name": config.dataset, "content_hash": parts.dataset.manifest.content_hash},
            "protocol": {
                "split": "test",
                "users": len(model.user_rows),
                "targets": len(model.targets),
                "candidates": parts.dataset.manifest.num_items,
                "exclude_history": config.evaluation.exclude_history,
                "num_beams": config.evaluation.num_beams,
                "interval": "95 % percentile bootstrap over users",
            },
            "methods": _summaries(rankings, config.evaluation),
            "config": json.loads(json.dumps(asdict(config), default=str)),
            "versions": code_version(),
        }
        write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")
        write_text(run_dir / RESULTS_TABLE, results_markdown(results))
        return results

    return on_first_rank(write_results)


def _rank_baselines(dataset: PreparedDataset, config: EvaluationConfig, seed: int) -> dict[str, RankedUsers]:
    num_results, num_items = max(config.cutoffs), dataset.manifest.num_items
    baselines: dict[str, MostPopular | ItemKNN] = {
        "most-popular": MostPopular(iterate_train_items(dataset), num_items),
        "item-kNN": ItemKNN(iterate_train_items(dataset), num_items),
    }

    def ranker(baseline: MostPopular | ItemKNN) -> Ranker:
        return lambda histories: baseline.rank(
            histories.seen_items, histories.seen_offsets, num_results, exclude_seen=config.exclude_history
        )

    return {name: rank_with_baseline(dataset, "test", ranker(baseline), num_results, None, seed) for name, baseline in baselines.items()}


def _summaries(rankings: dict[str, RankedUsers], config: EvaluationConfig) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> metric -> mean, low, high, and the paired difference of the first method to this one."""
    per_user = {name: ranking.metrics(config.cutoffs) for name, ranking in rankings.items()}
    first = next(iter(per_user.values()))
    summaries: dict[str, dict[str, dict[str, float]]] = {}
    for name, scores in per_user.items():
        summaries[name] = {}
        for metric, values in scores.items():
            mean, low, high = bootstrap_interval(values, config.bootstrap_samples, seed=0)
            summary = {"mean": mean, "low": low, "high": high}
            if scores is not first:
                difference, low, high = paired_bootstrap_interval(first[metric], values, config.bootstrap_samples, seed=0)
                summary |= {"first_minus_this": difference, "difference_low": low, "difference_high": high}
            summaries[name][metric] = summary
    return summaries
