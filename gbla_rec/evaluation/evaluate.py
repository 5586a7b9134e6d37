"""Full-catalogue evaluation of a run: beams on the shortlisted checkpoints, test at the best one, baselines beside it."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import RESULTS, Checkpoint, best_checkpoints, code_version, read_config, write_text
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.config import EvaluationConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.stream import iterate_train_items
from gbla_rec.evaluation.bootstrap import bootstrap_interval, paired_bootstrap_interval
from gbla_rec.evaluation.metrics import recall_at_k
from gbla_rec.evaluation.rank import RankedUsers, Ranker, Score, rank_with_baseline, rank_with_model
from gbla_rec.evaluation.table import results_markdown
from gbla_rec.models.baselines import ItemKNN, MostPopular
from gbla_rec.semantic_ids.trie import PrefixTrie

RESULTS_TABLE = "results.md"
SHORTLIST_CUTOFF = 10
"""Checkpoints are chosen by validation Recall at this cutoff, or at the largest one that is evaluated."""


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
        ranked = next(iter(rank_with_model(parts, trie, "validation", parts.config.evaluation.shortlist_users).values()))
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
    main = next(iter(model.values()))

    def write_results() -> dict[str, Any]:
        rankings = {_method_name(config.name, model, score): ranking for score, ranking in model.items()}
        rankings |= _rank_baselines(parts.dataset, config.evaluation, config.seed)
        results = {
            "run": str(run_dir),
            "checkpoint": best.path.name,
            "shortlist_validation_recall": shortlist,
            "dataset": {"name": config.dataset, "content_hash": parts.dataset.manifest.content_hash},
            "protocol": {
                "split": "test",
                "users": len(main.user_rows),
                "targets": len(main.targets),
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


def _method_name(run: str, scores: Iterable[Score], score: Score) -> str:
    """The run's name for its main score, the first; with the score in brackets for the others."""
    return run if score == next(iter(scores)) else f"{run} ({score})"


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
