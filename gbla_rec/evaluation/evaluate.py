"""Full-catalogue evaluation of a run: beams on the shortlisted checkpoints, test at the best one, baselines beside it."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import (
    RESULTS,
    RESULTS_TABLE,
    Checkpoint,
    code_version,
    read_config,
    shortlisted_checkpoints,
    write_text,
)
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.config import EvaluationConfig, RunConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.stream import iterate_train_items
from gbla_rec.evaluation.columns import EvaluatedUsers, column_results, history_name, sweep_results
from gbla_rec.evaluation.metrics import recall_at_k
from gbla_rec.evaluation.overrides import overridden_settings
from gbla_rec.evaluation.per_user import History, write_per_user
from gbla_rec.evaluation.rank import RankedUsers, Ranker, Score, Search, rank_by_main_score, rank_searches, rank_with_baseline, scores_of
from gbla_rec.evaluation.summaries import UserValues
from gbla_rec.evaluation.table import results_markdown
from gbla_rec.models.baselines import ItemKNN, MostPopular
from gbla_rec.semantic_ids.trie import PrefixTrie

SHORTLIST_CUTOFF = 10
"""Checkpoints are chosen by validation Recall at this cutoff, or at the largest one that is evaluated."""
ModelRankings = dict[Search, dict[Score, RankedUsers]]


def choose_checkpoint(parts: RunParts, run_dir: Path, trie: PrefixTrie) -> tuple[Checkpoint, dict[str, float]]:
    """The shortlisted checkpoint of the best validation recall by the main score; its weights are loaded when this returns.

    Returns:
        The checkpoint and the recall of every shortlisted one by directory name.
    """
    cutoff = min(SHORTLIST_CUTOFF, max(parts.config.evaluation.cutoffs))
    # one list for all ranks: a run that still trains may save and prune meanwhile
    shortlist = on_first_rank(lambda: shortlisted_checkpoints(run_dir))
    recalls: dict[str, float] = {}
    for checkpoint in shortlist:
        load_checkpoint(checkpoint, parts.model, None)
        ranked = rank_by_main_score(parts, trie, "validation", parts.config.evaluation.shortlist_users)
        per_user = recall_at_k(ranked.ranked, ranked.targets, ranked.target_offsets, cutoff)
        recalls[checkpoint.path.name] = float(per_user.mean()) if len(per_user) else 0.0
    best = max(shortlist, key=lambda checkpoint: recalls[checkpoint.path.name])
    load_checkpoint(best, parts.model, None)
    return best, recalls


def evaluate(run_dir: Path, *, device: torch.device, settings: EvaluationConfig | None = None) -> dict[str, Any]:
    """Evaluate a run on its test split; all ranks call it together.

    Writes ``per_user.parquet``, ``results.json`` and ``results.md`` into the run's directory. The baselines are fitted on the same
    training events and treat the history as the model does.

    Args:
        run_dir: the run's directory.
        device: where the model runs.
        settings: take the place of the run's own evaluation settings, in the choice of the checkpoint too; those that change the main
            figures are recorded as ``overrides`` of the protocol.

    Returns:
        What ``results.json`` holds: protocol, versions, and per method and metric the mean with a 95 % bootstrap interval.

    Raises:
        FileNotFoundError: if ``run_dir`` is no run directory, or its dataset or semantic IDs are missing.
        ValueError: if the dataset, the semantic IDs or a checkpoint is damaged or not the run's; the message names it.
    """
    own = read_config(run_dir)
    config = own if settings is None else replace(own, evaluation=settings)
    parts = RunParts.open(config, device, run_dir)
    trie = PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths).to(device)
    best, shortlist = choose_checkpoint(parts, run_dir, trie)
    rankings = rank_searches(parts, trie, "test", _searches(config))

    def write_results() -> dict[str, Any]:
        chosen = {"run": str(run_dir), "checkpoint": best.path.name, "shortlist_validation_recall": shortlist}
        results = chosen | _results(run_dir, config, parts.dataset, rankings) | {"versions": code_version()}
        results["protocol"]["overrides"] = overridden_settings(own.evaluation, config.evaluation)
        write_text(run_dir / RESULTS_TABLE, results_markdown(results))
        # last: it names the digest of the values of single users
        write_text(run_dir / RESULTS, json.dumps(results, indent=2) + "\n")
        return results

    return on_first_rank(write_results)


def _searches(config: RunConfig) -> list[Search]:
    """The main search, the other treatment of the history, and the sweep, each once."""
    settings = config.evaluation
    main = Search.of(settings)
    others = [Search(settings.num_beams, not settings.exclude_history)] if settings.both_histories else []
    swept = [_swept(settings, beams) for beams in settings.beam_sweep] if config.model.has_decoder else []
    return list(dict.fromkeys([main, *others, *swept]))


def _swept(settings: EvaluationConfig, beams: int) -> Search:
    """The search of a sweep: the main one at its own number of beams, else the one score that depends on that number."""
    main = Search.of(settings)
    return main if beams == main.num_beams else Search(beams, settings.exclude_history, "generative")


def _results(run_dir: Path, config: RunConfig, dataset: PreparedDataset, rankings: ModelRankings) -> dict[str, Any]:
    """Everything in ``results.json`` that follows from the rankings; the values of single users are written on the way."""
    settings = config.evaluation
    main = rankings[Search.of(settings)]
    ranked = next(iter(main.values()))
    names = _method_names(config.name, list(main))
    users = EvaluatedUsers.of(ranked, dataset.train_counts(), settings)
    per_user = _per_user_values(dataset, config, rankings, names)
    columns = [{"history": history, **column_results(values, users, settings.bootstrap_samples)} for history, values in per_user.items()]
    return {
        "dataset": {"name": config.dataset, "content_hash": dataset.manifest.content_hash},
        "protocol": _protocol(dataset, ranked, config),
        "scores": names,
        "methods": columns[0]["methods"],
        "slices": columns[0]["slices"],
        "other_history": columns[1] if settings.both_histories else None,
        "beam_sweep": [
            {"num_beams": beams, "methods": sweep_results(rankings.get(_swept(settings, beams), {}), names, beams, settings)}
            for beams in settings.beam_sweep
        ],
        "per_user": write_per_user(run_dir, users.frame(), per_user),
        "config": json.loads(json.dumps(asdict(config), default=str)),
    }


def _protocol(dataset: PreparedDataset, ranked: RankedUsers, config: RunConfig) -> dict[str, Any]:
    settings = config.evaluation
    return {
        "split": "test",
        "users": len(ranked.user_rows),
        "targets": len(ranked.targets),
        "candidates": dataset.manifest.num_items,
        "history": history_name(settings.exclude_history),
        "exclude_history": settings.exclude_history,
        **beam_settings(config),
        "interval": "95 % percentile bootstrap over users",
    }


def beam_settings(config: RunConfig) -> dict[str, int | float]:
    """Beams of the main search; for a model with the joint score also those of its candidates, and the weight of their log-probability."""
    settings = config.evaluation
    found: dict[str, int | float] = {"num_beams": settings.num_beams}
    if "joint" in scores_of(config.model):
        found |= {"joint_beams": max(settings.joint_beams, settings.num_beams), "beam_weight": settings.beam_weight}
    return found


def _per_user_values(
    dataset: PreparedDataset, config: RunConfig, rankings: ModelRankings, names: dict[Score, str]
) -> dict[History, UserValues]:
    """The values of every user by treatment of the history, the main one first: the model's scores, then the baselines."""
    settings = config.evaluation
    treatments = [settings.exclude_history, *([not settings.exclude_history] if settings.both_histories else [])]
    baselines = _rank_baselines(dataset, settings, treatments, config.seed)
    found: dict[History, UserValues] = {}
    for exclude_history in treatments:
        model = rankings[Search(settings.num_beams, exclude_history)]
        methods = {names[score]: ranking for score, ranking in model.items()} | baselines[exclude_history]
        found[history_name(exclude_history)] = {name: ranking.metrics(settings.cutoffs) for name, ranking in methods.items()}
    return found


def _method_names(run: str, scores: list[Score]) -> dict[Score, str]:
    """The run's name for its main score, the first; with the score in brackets for the others."""
    return {score: f"{run} ({score})" if place else run for place, score in enumerate(scores)}


def _rank_baselines(
    dataset: PreparedDataset, config: EvaluationConfig, treatments: list[bool], seed: int
) -> dict[bool, dict[str, RankedUsers]]:
    """The baselines' rankings by whether items of the own history are left out."""
    num_results, num_items = max(config.cutoffs), dataset.manifest.num_items
    baselines: dict[str, MostPopular | ItemKNN] = {
        "most-popular": MostPopular(iterate_train_items(dataset), num_items),
        "item-kNN": ItemKNN(iterate_train_items(dataset), num_items),
    }

    def ranker(baseline: MostPopular | ItemKNN, exclude_seen: bool) -> Ranker:
        return lambda histories: baseline.rank(histories.seen_items, histories.seen_offsets, num_results, exclude_seen=exclude_seen)

    return {
        exclude_seen: {
            name: rank_with_baseline(dataset, "test", ranker(baseline, exclude_seen), num_results, None, seed)
            for name, baseline in baselines.items()
        }
        for exclude_seen in treatments
    }
