"""The figures of the semantic-ID benchmark: pairs of the right events, and estimates that equal a slow count."""

import importlib.util
import json
import runpy
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from gbla_rec.config import PrepareConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.prepare import prepare

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
HISTORIES = {0: [12], 1: [10, 11, 12, 13], 2: [13, 10], 3: [11, 12, 10, 13, 11], 4: [12]}


@pytest.fixture
def transitions_module(monkeypatch):
    spec = importlib.util.spec_from_file_location("code_transitions", BENCHMARKS / "code_transitions.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "code_transitions", module)
    spec.loader.exec_module(module)
    return module


def toy(directory: Path, histories: dict[int, list[int]]) -> PreparedDataset:
    pl.DataFrame({"user_id": list(histories), "items": list(histories.values())}).write_parquet(directory / "histories.parquet")
    ids = sorted({item for history in histories.values() for item in history})
    titles = [f"kind{item % 4} shade{item % 3}" for item in ids]
    pl.DataFrame({"item_id": ids, "title": titles}).write_parquet(directory / "items.parquet")
    config = PrepareConfig(
        name="toy", events=directory / "histories.parquet", items=directory / "items.parquet", sequence_column="items",
        max_events_per_shard=6,
    )  # fmt: skip
    prepare(config, directory / "datasets" / "toy")
    return PreparedDataset.open(directory / "datasets" / "toy")


def test_pairs_are_consecutive_training_events_and_the_validation_event_after_them(transitions_module, tmp_path):
    dataset = toy(tmp_path, HISTORIES)
    training, validation = transitions_module.read_transitions(dataset)
    pairs = [sorted(zip((10 + p.before).tolist(), (10 + p.after).tolist(), strict=True)) for p in (training, validation)]
    expected = ([], [])
    for shard in dataset.iterate_shards():
        for first, end, begin in zip(shard.offsets, shard.offsets[1:], shard.validation_begin, strict=False):
            history = (10 + shard.items[first:end]).tolist()
            expected[0].extend(pairwise(history[: int(begin)]))
            if 0 < begin < len(history):
                expected[1].append((history[begin - 1], history[begin]))
    assert pairs == [sorted(part) for part in expected]
    # the last event of each history is for testing: (13, 11) of user 3 is in neither
    assert (11, 12) in pairs[0] and (13, 11) not in pairs[0] + pairs[1] and pairs[1]


def test_shares_and_information_are_those_of_a_slow_count(transitions_module):
    rng = np.random.default_rng(0)
    before, group = rng.integers(0, 12, 4000), np.arange(12) // 3
    # two in three pairs stay in their group
    after = np.where(rng.random(4000) < 2 / 3, 3 * group[before] + rng.integers(0, 3, 4000), rng.integers(0, 12, 4000))
    pairs = transitions_module.Transitions(before, after)
    share, chance = transitions_module.shared_fraction(pairs, group)
    assert share == pytest.approx(np.mean(group[before] == group[after])) and chance == pytest.approx(0.25, abs=0.01)
    joint, left, right = Counter(zip(group[before], group[after], strict=True)), Counter(group[before]), Counter(group[after])
    plug_in = sum(n / 4000 * np.log2(n * 4000 / (left[a] * right[b])) for (a, b), n in joint.items())
    assert transitions_module.mutual_information(pairs, group) == pytest.approx(plug_in, abs=0.01)
    # few pairs of many groups: independent items seem to share about 11^2 / (2 n ln 2) = 0.29 bits, which must be taken off
    few = transitions_module.Transitions(rng.integers(0, 12, 300), rng.integers(0, 12, 300))
    assert abs(transitions_module.mutual_information(few, np.arange(12))) < 0.1


def test_bits_are_those_of_a_proper_distribution_that_context_sharpens(transitions_module):
    rng = np.random.default_rng(1)
    codes = np.stack([np.arange(12) // 4, np.arange(12) % 4], axis=1)
    before = rng.integers(0, 12, 3000)
    after = np.where(rng.random(3000) < 0.8, 4 * codes[before, 0] + rng.integers(0, 4, 3000), rng.integers(0, 12, 3000))
    training = transitions_module.Transitions(before, after)
    bits = [
        transitions_module.held_out_bits(codes, training, transitions_module.Transitions(np.array([7]), np.array([item])))
        for item in range(12)
    ]
    for column in range(2):
        assert sum(2.0 ** -pair[column] for pair in bits) == pytest.approx(1)
    with_context, without = transitions_module.held_out_bits(codes, training, training)
    assert with_context < without - 0.5 and without == pytest.approx(np.log2(12), abs=0.02)


def test_the_benchmark_measures_a_dataset_and_keeps_its_rows(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    toy(tmp_path, {user: rng.integers(0, 30, 8).tolist() for user in range(40)})
    monkeypatch.setenv("GBLA_REC_WORKSPACE", str(tmp_path))
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(
        sys, "argv",
        ["benchmarks/semantic_ids.py", "--datasets", "toy", "--encoders", "tfidf", "--weights", "1", "--balance", "1",
         "--cache", str(tmp_path / "cache"), "--directory", str(tmp_path / "results")],
    )  # fmt: skip
    texts = []
    for _ in range(2):
        runpy.run_path(str(BENCHMARKS / "semantic_ids.py"), run_name="__main__")
        texts.append(json.loads((tmp_path / "results" / "semantic_ids.json").read_text())["rows"])
    assert texts[0] == texts[1]
    assert [row["assignment"] for row in texts[0]] == [
        *["nearest", "balance 1"],
        *["nearest", "distinct", "balance 1"],
        *["nearest", "balance 1"],
    ]
    assert {row["embedding"] for row in texts[0]} == {"tfidf", "tfidf + behaviour", "behaviour"}
    # 30 items fit 256 centroids: nothing is left over, and items of one vector collide only where they may
    assert {row["left over"] for row in texts[0] if row["assignment"] == "nearest"} == {"0.0%"}
    assert {row["collisions"] for row in texts[0] if row["assignment"] == "distinct"} == {"0.0%"}
    assert capsys.readouterr().out.count("'embedding'") == len(texts[0])
