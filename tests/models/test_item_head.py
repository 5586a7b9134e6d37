"""The item-level head: its losses, what its queries may see, and the ids that training leaves out."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch

from gbla_kernels import Backend
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ItemHeadConfig, ModelConfig
from gbla_rec.data.batch import Batch, Collator, feature_names
from gbla_rec.data.histories import HistoryBatch, StreamPosition
from gbla_rec.data.item_queries import QueryMaker
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.item_head import sampled_softmax_nll
from gbla_rec.models.retriever import GenerativeRetriever

NUM_ITEMS, WIDTHS = 30, (5, 4, 3)
EMBEDDING = EmbeddingConfig(rows_per_table=16, dim=8, context_features=("kind",), semantic_code_dim=4, item_features=True)
CONFIG = ModelConfig(
    embedding=EMBEDDING,
    encoder=EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16),
    decoder=DecoderConfig(num_heads=2, ffn_dim=16),
    objective="joint",
)
CAUSAL = dataclasses.replace(
    CONFIG,
    objective="item",
    encoder=dataclasses.replace(CONFIG.encoder, direction="causal"),
    item_head=ItemHeadConfig(every_position=True),
)
TRAINING = StreamPosition(0, 0, 5)


def retriever(config: ModelConfig) -> GenerativeRetriever:
    torch.manual_seed(0)
    tables = item_tables(config.embedding, {"kind": 2}, torch.device("cpu"))
    initialize_tables(tables, 0)
    codes = torch.stack([torch.randint(0, width, (NUM_ITEMS,)) for width in WIDTHS], dim=1)
    features = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, 6), dim=1)
    return GenerativeRetriever(
        tables, config, feature_names(config.embedding), codes, WIDTHS, backend=Backend.REFERENCE, item_features=features
    )


def histories(rows: list[list[int]], targets: list[list[int]], position: StreamPosition | None = TRAINING) -> HistoryBatch:
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    return HistoryBatch.of_lengths(
        items,
        [len(row) for row in rows],
        context={"kind": (items % 2).astype(np.int32)},
        targets=np.array([item for row in targets for item in row], dtype=np.int64),
        target_lengths=[len(row) for row in targets],
        token_keys=np.arange(len(items)) * 7 + 3,
        global_num_targets=max(sum(map(len, targets)), 1),
        global_num_tokens=max(len(items), 1),
        position=position,
    )


def collate(config: ModelConfig, batch: HistoryBatch) -> Batch:
    maker = QueryMaker(config.item_head, NUM_ITEMS, np.arange(NUM_ITEMS), seed=3)
    return Collator(config.embedding, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS), query_maker=maker)(batch)


ROWS, TARGETS = [[1, 2, 3], [4], [5, 6, 7, 8, 9]], [[2, 4], [1], [3]]


def test_a_sampled_softmax_over_every_item_once_is_the_full_softmax() -> None:
    torch.manual_seed(1)
    queries, vectors, items = torch.randn(5, 4), torch.randn(NUM_ITEMS, 4), torch.randint(0, NUM_ITEMS, (5,))
    scores = queries @ vectors.T
    sampled = sampled_softmax_nll(scores[torch.arange(5), items], scores, items, torch.arange(NUM_ITEMS), torch.zeros(NUM_ITEMS))
    assert relative_error(sampled, torch.nn.functional.cross_entropy(scores, items, reduction="none")) < 1e-6


def test_the_log_q_correction_makes_the_sum_over_negatives_unbiased() -> None:
    config = ItemHeadConfig(num_sampled=20_000, sampling_power=1.0)
    maker = QueryMaker(config, NUM_ITEMS, np.arange(NUM_ITEMS) ** 2, seed=0)
    queries = maker(histories([[1]], [[2]]))
    torch.manual_seed(0)
    scores, negatives = torch.randn(NUM_ITEMS), queries.candidates[1:]
    nll = sampled_softmax_nll(scores[2:3], scores[negatives][None], torch.tensor([2]), negatives, queries.log_expected)
    exact = torch.logsumexp(scores, 0) - scores[2]
    # 20,000 draws of weights that vary by a few: a standard error of about 1 %
    assert float(nll) == pytest.approx(float(exact), abs=0.05)
    assert abs(float(nll) - math.log(1 + 20_000)) > 1, "without the correction it would be this large"


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_negatives_do_not_depend_on_how_ranks_share_a_batch(loss: Any) -> None:
    maker = QueryMaker(ItemHeadConfig(loss=loss, num_sampled=6), NUM_ITEMS, None, seed=1)
    whole = maker(histories(ROWS, TARGETS))
    keys = np.arange(9) * 7 + 3
    negatives = []
    for row, tokens in ((slice(0, 1), slice(0, 3)), (slice(1, 3), slice(3, 9))):
        part = dataclasses.replace(histories(ROWS[row], TARGETS[row]), token_keys=keys[tokens], user_rows=np.arange(3)[row])
        found = maker(part)
        negatives.append(found.candidates[found.labels.numel() :])
    own = whole.candidates[whole.labels.numel() :]
    if loss == "bce":
        assert torch.equal(torch.cat(negatives), own)
        assert (own.view(-1, 6) != whole.candidates[:4, None]).all(), "a negative is never the item asked for"
        assert len(own.unique()) > 6
    else:
        assert torch.equal(negatives[0], own) and torch.equal(negatives[1], own)
        assert not torch.equal(maker(histories(ROWS, TARGETS, StreamPosition(0, 0, 9))).candidates[4:], own)


def test_negatives_of_an_evaluation_differ_between_users_and_targets() -> None:
    maker = QueryMaker(ItemHeadConfig(loss="bce", num_sampled=6), 1_000, None, seed=1)
    batch = histories(ROWS, TARGETS, position=None)
    found = maker(dataclasses.replace(batch, token_keys=np.zeros_like(batch.token_keys)))
    assert len({tuple(own) for own in found.candidates[4:].view(4, 6).tolist()}) == 4


def test_packed_batch_is_each_row_alone() -> None:
    model = retriever(CONFIG).eval()
    loss, nll = model(collate(CONFIG, histories(ROWS, TARGETS)))
    assert nll.shape == (4,)
    assert float(loss) == pytest.approx(float(nll.mean()), rel=1e-6)
    alone = [model(collate(CONFIG, histories([row], [target])))[1] for row, target in zip(ROWS, TARGETS, strict=True)]
    assert relative_error(nll, torch.cat(alone)) < 1e-6


def test_both_losses_add_up_and_their_encoder_is_one() -> None:
    batch = collate(CONFIG, histories(ROWS, TARGETS))
    joint = retriever(CONFIG).eval()(batch)[1]
    parts = []
    for objective in ("generative", "item"):
        model = retriever(dataclasses.replace(CONFIG, objective=objective)).eval()  # type: ignore[arg-type]
        model.load_state_dict(retriever(CONFIG).state_dict(), strict=False)
        parts.append(model(batch)[1])
    assert relative_error(joint, parts[0] + parts[1]) < 1e-6
    halved = dataclasses.replace(CONFIG, item_head=ItemHeadConfig(weight=0.5))
    assert relative_error(retriever(halved).eval()(batch)[1], parts[0] + 0.5 * parts[1]) < 1e-6


def test_every_event_asks_for_the_next_and_sees_none_after_itself() -> None:
    batch = collate(CAUSAL, histories(ROWS, TARGETS))
    assert batch.queries is not None
    assert batch.queries.labels.tolist() == [2, 3, 2, 1, 6, 7, 8, 9, 3]
    assert batch.num_global_targets == 9 and batch.loss_weight == 1 / 9
    model = retriever(CAUSAL).eval()
    nll = model(batch)[1]
    changed = model(collate(CAUSAL, histories([[1, 2, 3], [4], [5, 6, 20, 21, 22]], TARGETS)))[1]
    # the label of the second event of the last row is the first changed one
    assert torch.equal(nll[:5], changed[:5]) and not torch.equal(nll[5:], changed[5:])


def test_in_evaluation_only_the_newest_event_asks() -> None:
    batch = collate(CAUSAL, histories(ROWS, TARGETS, position=None))
    assert batch.queries is not None
    assert batch.queries.positions.tolist() == [2, 2, 3, 8]
    assert batch.queries.labels.tolist() == [2, 4, 1, 3] and batch.num_global_targets == 4


def test_queries_of_a_search_score_as_the_loss_does() -> None:
    model = retriever(dataclasses.replace(CONFIG, objective="item")).eval()
    batch = collate(CONFIG, histories(ROWS, TARGETS))
    encoded = model.encode(batch)
    assert encoded.memory is None and encoded.queries is not None
    items = torch.arange(NUM_ITEMS)
    features = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS)).item_features(items)
    scores = encoded.queries[[0, 0, 1, 2]] @ model.item_vectors(features, items).T
    expected = torch.nn.functional.cross_entropy(scores, batch.targets, reduction="none")
    assert relative_error(model(batch)[1], expected) < 1e-6


def test_candidates_follow_the_history_and_have_no_context() -> None:
    config = dataclasses.replace(CONFIG, item_head=ItemHeadConfig(num_sampled=5))
    batch = collate(config, histories(ROWS, TARGETS))
    assert batch.queries is not None
    *hashes, context = (batch.features[name].values() for name in feature_names(EMBEDDING))
    alone = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=3).item_features(torch.cat([batch.items, batch.queries.candidates]))
    for values, name in zip(hashes, feature_names(EMBEDDING), strict=False):
        assert torch.equal(values, alone[name].values())
    assert context.tolist() == [item % 2 for row in ROWS for item in row] + [0] * batch.queries.candidates.numel()


def test_a_search_looks_up_histories_alone_and_finds_the_same_queries() -> None:
    model = retriever(CONFIG).eval()
    maker = QueryMaker(CONFIG.item_head, NUM_ITEMS, None, seed=3)
    collator = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS), query_maker=maker)
    batch = histories(ROWS, TARGETS, position=None)
    lean, whole = collator(batch, with_queries=False), collator(batch)
    assert lean.queries is None and lean.features[feature_names(EMBEDDING)[0]].values().numel() == 9
    assert whole.features[feature_names(EMBEDDING)[0]].values().numel() == 9 + NUM_ITEMS
    found, expected = model.encode(lean).queries, model.encode(whole).queries
    assert found is not None and expected is not None and torch.equal(found, expected)


def test_the_query_of_an_empty_row_is_zero_and_moves_no_other() -> None:
    model = retriever(CONFIG).eval()
    queries = [
        model.encode(collate(CONFIG, histories(rows, [[0]] * len(rows)))).queries for rows in ([[1, 2], [3]], [[1, 2], [], [3], []], [[]])
    ]
    assert all(found is not None for found in queries)
    assert relative_error(queries[1][[0, 2]], queries[0]) < 1e-6
    assert not queries[1][[1, 3]].any() and queries[2].tolist() == [[0.0] * 16]


HEADS = (ItemHeadConfig(), ItemHeadConfig(num_sampled=5), ItemHeadConfig(loss="bce", num_sampled=2), ItemHeadConfig(label_smoothing=0.2))


@pytest.mark.parametrize("head", HEADS)
def test_a_rank_without_rows_takes_part_in_every_loss(head: ItemHeadConfig) -> None:
    config = dataclasses.replace(CONFIG, item_head=head)
    for position in (TRAINING, None):
        model = retriever(config).train(position is not None)
        loss, nll = model(collate(config, histories([], [], position)))
        loss.backward()
        assert nll.shape == (0,) and float(loss) == 0
        assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_every_part(head: ItemHeadConfig) -> None:
    config = dataclasses.replace(CONFIG, item_head=head)
    model = retriever(config).train()
    model(collate(config, histories(ROWS, TARGETS)))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert bool(parameter.grad.any()), name


def test_left_out_ids_are_all_ids_of_an_event_or_none() -> None:
    def tokens(probability: float, training: bool) -> torch.Tensor:
        config = dataclasses.replace(CONFIG, embedding=dataclasses.replace(EMBEDDING, id_dropout=probability))
        layer = retriever(config).history.input
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(4_000, 8, generator=generator) for _ in range(3)]
        codes, features = torch.zeros(4_000, 3, dtype=torch.int64), torch.zeros(4_000, 6)
        return layer(rows, codes, features, torch.arange(4_000) * 977 if training else None)  # type: ignore[no-any-return]

    without = tokens(1.0, True)
    kept = (tokens(0.5, True) != without).any(dim=1)
    assert 0.47 < float(kept.float().mean()) < 0.53
    # an event that keeps its ids has both, at twice their size
    assert relative_error(tokens(0.5, True)[kept] - without[kept], 2 * (tokens(0.0, True) - without)[kept]) < 1e-5
    assert torch.equal(tokens(0.5, False), tokens(0.0, False))
    assert torch.equal(tokens(1.0, False), without)


DROPPED = dataclasses.replace(
    CONFIG,
    embedding=dataclasses.replace(EMBEDDING, id_dropout=0.5, event_dropout=0.3, token_dropout=0.4),
    encoder=dataclasses.replace(CONFIG.encoder, dropout=0.3),
)


def test_no_input_is_left_out_in_evaluation_and_none_of_an_item_in_training() -> None:
    model, plain = retriever(DROPPED), retriever(CONFIG)
    batch, items = collate(CONFIG, histories(ROWS, TARGETS)), torch.arange(NUM_ITEMS)
    assert torch.equal(model.eval()(batch)[1], plain.eval()(batch)[1])
    assert not torch.equal(model.train()(batch)[1], plain.train()(batch)[1])
    features = Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=len(WIDTHS)).item_features(items)
    assert torch.equal(model.item_vectors(features, items), plain.item_vectors(features, items))


def test_event_and_token_dropout_zero_whole_tokens_and_single_elements() -> None:
    def tokens(**dropouts: float) -> torch.Tensor:
        config = dataclasses.replace(CONFIG, embedding=dataclasses.replace(EMBEDDING, **dropouts))  # type: ignore[arg-type]
        rows = [torch.ones(4_000, 8)] * 3
        codes, features = torch.zeros(4_000, 3, dtype=torch.int64), torch.zeros(4_000, 6)
        return retriever(config).history.input(rows, codes, features, torch.arange(4_000) * 977)  # type: ignore[no-any-return]

    plain = tokens()
    assert plain.all()
    of_events, of_elements = tokens(event_dropout=0.3), tokens(token_dropout=0.3)
    kept = of_events.any(dim=1)
    assert 0.67 < float(kept.float().mean()) < 0.73
    assert relative_error(of_events[kept], plain[kept] / 0.7) < 1e-6
    assert 0.67 < float(of_elements.bool().float().mean()) < 0.73 and of_elements.any(dim=1).float().mean() > 0.99
    assert relative_error(of_elements[of_elements != 0], (plain / 0.7)[of_elements != 0]) < 1e-6
    # draws of their own: of the events that stay, half have no ids
    both, without_ids = tokens(event_dropout=0.5, id_dropout=0.5), tokens(id_dropout=1.0)
    has_ids = (both[both.any(dim=1)] - 2 * without_ids[0]).abs().amax(dim=1) > 1e-3
    assert 0.45 < float(has_ids.float().mean()) < 0.55


def test_queries_are_scaled_by_the_root_of_the_width() -> None:
    head = retriever(CONFIG).history.item_head
    assert head is not None
    encoded = torch.randn(5, 16)
    assert relative_error(head.query(encoded, torch.tensor([4, 0])), head.query_projection(encoded[[4, 0]]) / 4) < 1e-6


def test_label_smoothing_counts_in_training_only() -> None:
    smoothed = retriever(dataclasses.replace(CONFIG, item_head=ItemHeadConfig(label_smoothing=0.3)))
    plain, batch = retriever(CONFIG), collate(CONFIG, histories(ROWS, TARGETS))
    assert torch.equal(smoothed.eval()(batch)[1], plain.eval()(batch)[1])
    assert not torch.equal(smoothed.train()(batch)[1], plain.train()(batch)[1])


def test_negatives_are_drawn_by_a_power_of_their_training_events() -> None:
    counts = np.array([0, 3, 8, 15])
    for power, weights in ((0.0, [1, 1, 1, 1]), (0.5, [1, 2, 3, 4]), (1.0, [1, 4, 9, 16])):
        found = QueryMaker(ItemHeadConfig(num_sampled=20_000, sampling_power=power), 4, counts, seed=0)(histories([[1]], [[2]]))
        shares = np.array(weights) / sum(weights)
        drawn = np.bincount(found.candidates[1:].numpy(), minlength=4) / 20_000
        assert drawn == pytest.approx(shares, abs=0.02), power
        assert found.log_expected.numpy() == pytest.approx(np.log(20_000 * shares)[found.candidates[1:]], rel=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        dataclasses.replace(CONFIG, item_head=ItemHeadConfig(num_sampled=5)),
        dataclasses.replace(CONFIG, item_head=ItemHeadConfig(loss="bce", num_sampled=2)),
        CAUSAL,
    ],
)
def test_losses_of_micro_batches_add_up_to_that_of_the_batch(config: ModelConfig) -> None:
    model, batch = retriever(config).eval(), histories(ROWS, TARGETS)
    counts = {"global_num_targets": batch.global_num_targets, "global_num_tokens": batch.global_num_tokens}
    losses = []
    # the last part is empty
    for row, tokens in ((slice(1), slice(3)), (slice(1, 2), slice(3, 4)), (slice(2, 3), slice(4, 9)), (slice(0), slice(0))):
        keys = {"token_keys": batch.token_keys[tokens], "user_rows": batch.user_rows[row]}
        part = dataclasses.replace(histories(ROWS[row], TARGETS[row]), **keys, **counts)
        losses.append(float(model(collate(config, part))[0]))
    assert min(losses) == 0 and sum(losses) == pytest.approx(float(model(collate(config, batch))[0]), rel=1e-5)


def test_an_item_vector_has_no_context() -> None:
    model = retriever(CONFIG).eval()
    items = torch.tensor([3, 4])
    alone = collate(CONFIG, histories([[3], [4]], [[0], [0]]))
    vectors = model.item_vectors(Collator(EMBEDDING, list(range(NUM_ITEMS)), num_code_levels=3).item_features(items), items)
    rows = [model.tables(alone.features)[name].values()[:2] for name in feature_names(EMBEDDING)]
    rows[2] = torch.zeros_like(rows[2])
    expected = model.history.input(rows, model.history.item_codes[items], model.history.item_features[items])
    assert torch.equal(vectors, expected)


def test_a_decoder_that_is_not_there_asks_for_nothing() -> None:
    encoder = dataclasses.replace(CONFIG.encoder, model_dim=600, num_heads=4)
    heads = {"encoder": encoder, "embedding": EMBEDDING}
    assert retriever(ModelConfig(objective="item", decoder=DecoderConfig(num_heads=7), **heads)).history.decoder is None
    # heads of 600 columns, for which there is no kernel
    assert ModelConfig(objective="item", decoder=DecoderConfig(num_heads=1), **heads).kernels_on("cuda") == "triton"
    assert ModelConfig(objective="joint", decoder=DecoderConfig(num_heads=1), **heads).kernels_on("cuda") == "reference"
    with pytest.raises(ValueError, match=r"DecoderConfig\.num_heads must divide"):
        ModelConfig(objective="joint", decoder=DecoderConfig(num_heads=7), **heads)


def test_heads_that_would_see_their_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="every_position must be False unless objective is 'item'"):
        dataclasses.replace(CONFIG, item_head=ItemHeadConfig(every_position=True))
    with pytest.raises(ValueError, match="num_sampled must be positive with loss='bce'"):
        ItemHeadConfig(loss="bce")
