"""The retriever reads events before the cut only, and its loss does not see padding, order of rows, or other rows."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from gbla_kernels import Backend
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig, PrepareConfig, SplitConfig, StreamConfig
from gbla_rec.data.batch import IDS_PER_RUN, Batch, Collator, feature_names
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import evaluation_batches
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.data.prepare import prepare
from gbla_rec.data.stream import TrainingStream
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.retriever import GenerativeRetriever

NUM_ITEMS = 30
WIDTHS = (5, 4, 3)
EMBEDDING = EmbeddingConfig(rows_per_table=16, dim=8, context_features=("kind",), semantic_code_dim=4)
CONFIG = ModelConfig(
    embedding=EMBEDDING,
    encoder=EncoderConfig(model_dim=16, num_heads=2, pattern="SGG", ffn_dim=16),
    decoder=DecoderConfig(num_heads=2, ffn_dim=16),
)


@pytest.fixture
def retriever() -> GenerativeRetriever:
    torch.manual_seed(0)
    tables = item_tables(EMBEDDING, {"kind": 2}, torch.device("cpu"))
    initialize_tables(tables, 0)
    codes = torch.stack([torch.randint(0, width, (NUM_ITEMS,)) for width in WIDTHS], dim=1)
    return GenerativeRetriever(tables, CONFIG, feature_names(EMBEDDING), codes, WIDTHS, backend=Backend.REFERENCE)


def histories(rows: list[list[int]], targets: list[list[int]]) -> HistoryBatch:
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    return HistoryBatch.of_lengths(
        items,
        [len(row) for row in rows],
        context={"kind": (items % 2).astype(np.int32)},
        targets=np.array([item for row in targets for item in row], dtype=np.int64),
        target_lengths=[len(row) for row in targets],
        token_keys=items * 7,
        global_num_targets=max(sum(map(len, targets)), 1),
    )


def collate(rows: list[list[int]], targets: list[list[int]]) -> Batch:
    return Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS))(histories(rows, targets))


def test_packed_batch_is_each_row_alone(retriever: GenerativeRetriever) -> None:
    rows, targets = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]], [[2, 4], [1], [], [3]]
    loss, nll = retriever.eval()(collate(rows, targets))
    assert nll.shape == (4,)
    assert float(loss) == pytest.approx(float(nll.mean()), rel=1e-6)
    alone = [retriever(collate([row], [target]))[1] for row, target in zip(rows, targets, strict=True)]
    assert relative_error(nll, torch.cat(alone)) < 1e-6


def test_features_are_the_hashed_items_and_their_context() -> None:
    batch = collate([[1, 2], [], [29]], [[0], [0], [0]])
    assert batch.features.keys() == ["item_hash_0", "item_hash_1", "context_kind"]
    assert batch.features["context_kind"].values().tolist() == [1, 0, 1]
    assert batch.layout.row_lengths == [2, 0, 1]
    assert batch.code_layout.row_lengths == [3, 3, 3]
    assert len(set(batch.target_keys.tolist())) == 3


def test_dropout_keys_make_training_steps_repeatable(retriever: GenerativeRetriever) -> None:
    batch = collate([[1, 2, 3], [4, 5]], [[2], [4]])
    assert torch.equal(retriever.train()(batch)[1], retriever(batch)[1])


def test_samples_are_cuts_of_real_histories_between_ties(tiny_workspace: Path) -> None:
    dataset = PreparedDataset.open(tiny_workspace / "datasets" / "tiny")
    shard = dataset.read_shard(0, ("kind",))
    config = StreamConfig(tokens_per_batch=500, max_history_length=60, targets_per_cut=4)
    batches = TrainingStream(dataset, config, seed=0, context=("kind",)).batches()
    checked = 0
    for _ in range(5):
        batch = next(batches)
        for row, user in enumerate(batch.user_rows):
            if not shard.first_user <= user < shard.first_user + len(shard.offsets) - 1:
                continue
            local = user - shard.first_user
            events = slice(shard.offsets[local], shard.offsets[local + 1])
            memory = batch.items[batch.offsets[row] : batch.offsets[row + 1]]
            targets = batch.targets[batch.target_offsets[row] : batch.target_offsets[row + 1]]
            history, times = shard.items[events], shard.timestamps[events]
            cuts = [
                cut
                for cut in range(1, len(history))
                if np.array_equal(history[max(cut - 60, 0) : cut], memory) and np.array_equal(history[cut : cut + len(targets)], targets)
            ]
            assert cuts, "a sample is a cut of its user's history"
            # tied events stay on one side of the cut, and no target is a validation event
            assert any(times[cut - 1] < times[cut] and cut + len(targets) <= shard.validation_begin[local] for cut in cuts)
            checked += 1
    assert checked > 10


def test_changing_events_at_or_after_the_cut_leaves_the_memory_bit_identical(tmp_path: Path, retriever: GenerativeRetriever) -> None:
    """Two logs that differ in the last two events of each user, the test targets, from the file to the decoder's memory."""
    rows = [(user, (user * 3 + k) % NUM_ITEMS, k, "ab"[k % 2]) for user in range(8) for k in range(12)]
    changed = [(user, (item + 11) % NUM_ITEMS if k >= 10 else item, k, kind if k < 10 else "a") for user, item, k, kind in rows]
    memories, targets = [], []
    for name, log in (("before", rows), ("after", changed)):
        pl.DataFrame(log, schema=["user_id", "item_id", "timestamp", "kind"], orient="row").write_parquet(tmp_path / f"{name}.parquet")
        pl.DataFrame({"item_id": range(NUM_ITEMS)}).write_parquet(tmp_path / "items.parquet")
        config = PrepareConfig(
            name=name,
            events=tmp_path / f"{name}.parquet",
            items=tmp_path / "items.parquet",
            context_columns=("kind",),
            split=SplitConfig(num_targets=2),
        )
        dataset = prepare(config, tmp_path / name)
        collator = Collator(EMBEDDING, dataset.items()["item_id"].to_list(), num_code_levels=len(WIDTHS))
        (histories,) = evaluation_batches(dataset, "test", tokens_per_batch=1000, max_history_length=50, context=("kind",))
        targets.append(histories.targets)
        memories.append(retriever.eval().encode(collator(histories)).memory)
    first, second = memories
    assert first.layout.num_tokens == 80
    assert not np.array_equal(*targets)
    assert torch.equal(first.key_values[0], second.key_values[0])


@pytest.mark.parametrize("lengths", [[0], [5], [16, 16], [0, 47, 1], [1, 64, 3]])
def test_tables_see_all_ids_in_order_in_short_runs(lengths: list[int]) -> None:
    rows = [[index % NUM_ITEMS for index in range(length)] for length in lengths]
    batch = collate(rows, [[1] for _ in rows])
    values = batch.features.values().view(len(batch.features.keys()), -1)
    runs = batch.features.lengths().view(len(values), -1)
    assert runs.shape[1] >= 1 and int(runs.max()) <= IDS_PER_RUN and bool((runs == runs[0]).all())
    assert runs.sum(1).tolist() == [sum(lengths)] * len(values)
    hashed = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS)).hash_rows
    assert torch.equal(values[: len(hashed)], hashed[:, batch.items])
