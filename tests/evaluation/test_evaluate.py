"""Evaluation of a real run: the same on one and two ranks, from any world size's checkpoint, and with titles at the end."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from gbla_rec.checkpoint.run_directory import TEMPORARY_PREFIX
from gbla_rec.config import RunConfig
from gbla_rec.evaluation.per_user import read_per_user, values_of
from gbla_rec.evaluation.rank import RankedUsers, _in_user_order

CPU = torch.device("cpu")


def train_run(rank: int, world_size: int, config: RunConfig) -> str:
    from gbla_rec.training.trainer import train

    return str(train(config, device=CPU))


def evaluate_run(rank: int, world_size: int, run_dir: str, **changes: Any) -> dict[str, Any]:
    from gbla_rec.checkpoint.run_directory import read_config
    from gbla_rec.evaluation.evaluate import evaluate

    settings = dataclasses.replace(read_config(Path(run_dir)).evaluation, **changes)
    return evaluate(Path(run_dir), device=CPU, settings=settings)


def evaluate_everything(rank: int, world_size: int, run_dir: str) -> dict[str, Any]:
    return evaluate_run(rank, world_size, run_dir, both_histories=True, beam_sweep=(3, 10), history_edges=(20, 40), cold_edges=(5, 9))


def evaluate_with_history_removed(rank: int, world_size: int, run_dir: str) -> dict[str, Any]:
    return evaluate_run(rank, world_size, run_dir, exclude_history=True)


def require_whole(results: dict[str, Any], run_dir: str) -> None:
    """Slices divide the users, and their weighted means and the file of single users give the means of all."""
    frame = read_per_user(Path(run_dir), results)
    assert frame["user_row"].to_list() == list(range(60))
    assert frame["history_length"].max() > 800, "the whole history counts, not the 100 events that are read"
    for column in (results | {"history": results["protocol"]["history"]}, results["other_history"]):
        for slices in column["slices"].values():
            assert sum(part["users"] for part in slices) == 60
            for method, metrics in column["methods"].items():
                for metric, summary in metrics.items():
                    weighted = sum(part["users"] * part["methods"][method][metric]["mean"] for part in slices if part["users"]) / 60
                    assert weighted == pytest.approx(summary["mean"], abs=1e-12)
                    assert values_of(frame, column["history"], method)[metric].mean() == pytest.approx(summary["mean"], abs=1e-12)
    for name, label in (("history_length", "history_slice"), ("rarest_target_events", "cold_slice")):
        counts = dict(frame.group_by(label).len().iter_rows())
        assert {part["label"]: part["users"] for part in results["slices"][name] if part["users"]} == counts
        for part in results["slices"][name]:
            inside = frame.filter(frame[label] == part["label"])[name]
            assert all(part["low"] <= value and (part["high"] is None or value <= part["high"]) for value in inside)


def seen_items_in_rankings(rank: int, world_size: int, run_dir: str) -> tuple[int, int]:
    """Ranked items that the user had seen: (with exclude_history, without)."""
    from gbla_rec.checkpoint.run_directory import read_config
    from gbla_rec.checkpoint.run_parts import RunParts
    from gbla_rec.evaluation.rank import rank_by_main_score
    from gbla_rec.semantic_ids.trie import PrefixTrie

    counts = []
    for exclude in (True, False):
        config = read_config(Path(run_dir))
        config = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, exclude_history=exclude))
        parts = RunParts.open(config, CPU)
        ranked = rank_by_main_score(parts, PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths), "test")
        rows = dict(zip(ranked.user_rows.tolist(), ranked.ranked.tolist(), strict=True))
        count = 0
        for histories, _ in parts.evaluation_batches("test", config.evaluation.tokens_per_batch):
            for user, seen in zip(histories.user_rows.tolist(), np.split(histories.seen_items, histories.seen_offsets[1:-1]), strict=False):
                count += len(set(seen.tolist()) & set(rows[user]))
        counts.append(count)
    return counts[0], counts[1]


def recommend(rank: int, world_size: int, run_dir: str) -> dict[str, Any]:
    from gbla_rec.evaluation.recommend import Recommender

    recommender = Recommender.open(Path(run_dir), CPU)
    for_user = recommender.for_user("3", 5)
    first, second = for_user.history_titles[:2]
    typed = recommender.for_history(f"{first}, {second}", 5)
    by_id = recommender.for_history(
        ", ".join(str(for_id) for for_id in (2**40 + int(first.split()[-1]), 2**40 + int(second.split()[-1]))), 5
    )
    errors = []
    for attempt in (
        lambda: recommender.for_user("--5", 5),
        lambda: recommender.for_user("77777", 5),
        lambda: recommender.for_history("title 3", 5),
    ):
        with pytest.raises(ValueError) as refused:
            attempt()
        errors.append(str(refused.value))
    return {"user": for_user, "typed": typed, "by_id": by_id, "errors": errors}


def recommend_to_everyone(rank: int, world_size: int, run_dir: str, path: str) -> dict[str, Any]:
    from gbla_rec.evaluation.recommend import Recommender
    from gbla_rec.evaluation.recommend_to_all import recommend_to_all

    recommender = Recommender.open(Path(run_dir), CPU)
    said: list[int] = []
    found: dict[str, Any] = {"users": recommend_to_all(recommender, Path(path), 5, said=said.append), "said": said}
    with pytest.raises(FileExistsError, match="exists; delete it or choose another name"):
        recommend_to_all(recommender, Path(path), 5)
    if world_size == 1:
        ids = [user_id for shard in range(recommender.parts.dataset.num_shards) for user_id in recommender.parts.dataset.user_ids(shard)]
        each = [recommender.for_user(str(user_id), 5) for user_id in ids]
        found["alone"] = [(user_id, one.item_ids, one.scores) for user_id, one in zip(ids, each, strict=True)]
    return found


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(300)
def test_a_file_for_all_users_has_what_each_gets_alone_on_any_number_of_ranks(run_ranks: Any, tiny_run: Any, tmp_path: Path) -> None:
    run_dir = run_ranks(train_run, 2, tiny_run())[0]
    alone = run_ranks(recommend_to_everyone, 1, run_dir, str(tmp_path / "one" / "items.parquet"))[0]
    together = run_ranks(recommend_to_everyone, 2, run_dir, str(tmp_path / "two.parquet"))
    one, two = pl.read_parquet(tmp_path / "one" / "items.parquet"), pl.read_parquet(tmp_path / "two.parquet")
    assert one.columns == ["user_id", "item_ids", "scores"] and len(one) == alone["users"] == alone["said"][-1] == together[1]["users"]
    assert one["user_id"].to_list() == [user_id for user_id, *_ in alone["alone"]]
    assert one["item_ids"].to_list() == [items for _, items, _ in alone["alone"]]
    for row, (*_, scores) in zip(one["scores"].to_list(), alone["alone"], strict=True):
        assert row == pytest.approx(scores, rel=1e-4)
    assert two.select("user_id", "item_ids").equals(one.select("user_id", "item_ids"))
    # after every shard, and nothing temporary stays
    assert len(alone["said"]) > 1 and alone["said"] == together[0]["said"] and not together[1]["said"]
    assert not [path for path in (*tmp_path.glob("*"), *(tmp_path / "one").glob("*")) if path.name.startswith(TEMPORARY_PREFIX)]


@pytest.mark.usefixtures("tiny_workspace")
@pytest.mark.timeout(300)
def test_evaluation_does_not_depend_on_the_ranks_and_recommendations_have_titles(run_ranks: Any, tiny_run: Any) -> None:
    run_dir = run_ranks(train_run, 2, tiny_run())[0]
    removed = run_ranks(evaluate_with_history_removed, 1, run_dir)[0]
    alone = run_ranks(evaluate_everything, 1, run_dir)[0]
    files = ("results.json", "results.md", "per_user.parquet")
    written = [[(Path(run_dir) / name).read_bytes() for name in files]]
    for world_size in (2, 3):
        for name in files:
            (Path(run_dir) / name).unlink()
        assert run_ranks(evaluate_everything, world_size, run_dir) == [alone] * world_size
        written.append([(Path(run_dir) / name).read_bytes() for name in files])
    assert written == written[:1] * 3
    require_whole(alone, run_dir)
    assert alone["other_history"]["methods"] == removed["methods"] != alone["methods"]
    knn = [column["methods"]["item-kNN"]["Recall@5"]["mean"] for column in (alone, alone["other_history"])]
    assert knn[0] != knn[1], "baselines treat the history likewise"
    assert [row["num_beams"] for row in alone["beam_sweep"]] == [3, 10]
    assert list(alone["beam_sweep"][0]["methods"]["tiny"]) == ["Recall@2", "NDCG@2"], "3 beams cannot fill 5 places"
    assert alone["beam_sweep"][1]["methods"] == {"tiny": alone["methods"]["tiny"]}, "the configured number of beams"
    assert alone["beam_sweep"][0]["methods"]["tiny"]["Recall@2"] != alone["methods"]["tiny"]["Recall@2"]
    assert list(alone["methods"]) == ["tiny", "most-popular", "item-kNN"]
    assert list(alone["methods"]["tiny"]) == ["Recall@2", "Recall@5", "NDCG@2", "NDCG@5"]
    assert "first_minus_this" in alone["methods"]["item-kNN"]["Recall@5"]
    assert json.loads((Path(run_dir) / "results.json").read_text())["methods"] == alone["methods"]
    assert "| most-popular |" in (Path(run_dir) / "results.md").read_text()
    assert alone["protocol"]["users"] == 60
    assert set(alone["shortlist_validation_recall"]) == {"step_00000003", "step_00000006"}

    excluded, included = run_ranks(seen_items_in_rankings, 1, run_dir)[0]
    assert excluded == 0 < included

    result, again = run_ranks(recommend, 2, run_dir)
    assert [result, again] == run_ranks(recommend, 1, run_dir) * 2
    user = result["user"]
    assert len(user.titles) == 5
    assert all(title.startswith("title ") for title in user.titles)
    assert user.scores == sorted(user.scores, reverse=True)
    assert not set(user.titles) & set(user.history_titles)
    assert result["typed"].titles == result["by_id"].titles
    assert result["typed"].history_titles == user.history_titles[:2]
    number, unknown, ambiguous = result["errors"]
    assert "user_id (--user) must be an integer" in number
    assert "77777" in unknown
    assert "names no item of the dataset; did you mean one of ['title 3 3" in ambiguous


def test_gathered_parts_come_back_in_user_order() -> None:
    def part(users: list[int], targets: list[list[int]], ranked: list[list[int]]) -> RankedUsers:
        flat = [item for row in targets for item in row]
        offsets = np.cumsum([0, *map(len, targets)])
        lengths = 100 * np.array(users, np.int64)
        return RankedUsers(np.array(users, np.int64), np.array(ranked, np.int64).reshape(-1, 2), np.array(flat, np.int64), offsets, lengths)

    together = _in_user_order([part([5, 1], [[50, 51], [10]], [[5, 5], [1, 1]]), part([], [], []), part([3], [[]], [[3, 3]])], 2)
    rows = np.array([1, 3, 5])
    expected = RankedUsers(rows, np.array([[1, 1], [3, 3], [5, 5]]), np.array([10, 50, 51]), np.array([0, 1, 1, 3]), 100 * rows)
    for name in ("user_rows", "ranked", "targets", "target_offsets", "history_lengths"):
        assert np.array_equal(getattr(together, name), getattr(expected, name)), name
