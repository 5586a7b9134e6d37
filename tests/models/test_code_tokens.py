"""Codes as the encoder's tokens: an event is its codes side by side, item ids are not read, and rows stay apart."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from gbla_kernels import Backend, JaggedLayout
from gbla_kernels.testing.error_budget import relative_error
from gbla_rec.config import DecoderConfig, EmbeddingConfig, EncoderConfig, ModelConfig, Tokens
from gbla_rec.data.batch import Batch, Collator, feature_names, looked_up_features
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.models.code_input import CodeInput
from gbla_rec.models.embeddings import initialize_tables, item_tables
from gbla_rec.models.retriever import GenerativeRetriever

NUM_ITEMS, WIDTHS = 30, (5, 4, 3)
C = len(WIDTHS)
EMBEDDING = EmbeddingConfig(dim=8, context_features=("kind",), tokens="codes")
ROWS, TARGETS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9]], [[2, 4], [1], [], [3]]


def retriever_of(embedding: EmbeddingConfig = EMBEDDING, pattern: str = "SSGW") -> GenerativeRetriever:
    config = ModelConfig(
        embedding=embedding,
        encoder=EncoderConfig(model_dim=16, num_heads=2, pattern=pattern, ffn_dim=16, window=2),
        decoder=DecoderConfig(num_heads=2, ffn_dim=16, num_layers=2),
    )
    torch.manual_seed(0)
    tables = item_tables(embedding, {"kind": 2}, torch.device("cpu"))
    initialize_tables(tables, 0)
    codes = torch.stack([torch.randint(0, width, (NUM_ITEMS,)) for width in WIDTHS], dim=1)
    return GenerativeRetriever(tables, config, feature_names(embedding), codes, WIDTHS, backend=Backend.REFERENCE).eval()


def collate(
    rows: list[list[int]], targets: list[list[int]], embedding: EmbeddingConfig = EMBEDDING, kinds: list[int] | None = None
) -> Batch:
    items = np.array([item for row in rows for item in row], dtype=np.int64)
    histories = HistoryBatch.of_lengths(
        items,
        [len(row) for row in rows],
        context={"kind": np.array(kinds, np.int32) if kinds else (items % 2).astype(np.int32)},
        targets=np.array([item for row in targets for item in row], dtype=np.int64),
        target_lengths=[len(row) for row in targets],
        token_keys=(items + 1) * 2**33,
        global_num_targets=max(sum(map(len, targets)), 1),
    )
    return Collator(embedding, list(range(NUM_ITEMS)), num_code_levels=C)(histories)


@pytest.mark.parametrize("rows", [ROWS, [[]], [list(range(17))]])
def test_a_layout_has_a_token_for_each_code_and_all_else_counts_events(rows: list[list[int]]) -> None:
    targets = [[1, 2] for _ in rows]
    codes, items = (collate(rows, targets, dataclasses.replace(EMBEDDING, tokens=tokens)) for tokens in ("codes", "items"))
    assert codes.layout.row_lengths == [C * len(row) for row in rows]
    assert items.layout.row_lengths == [len(row) for row in rows]
    assert torch.equal(codes.items, items.items) and codes.num_global_tokens == items.num_global_tokens
    # of dropout: one for each token, those of an event beginning with the event's; the targets keep theirs
    assert len(codes.token_keys) == codes.layout.num_tokens == len(set(codes.token_keys.tolist()))
    assert torch.equal(codes.token_keys[::C], items.token_keys) and torch.equal(codes.target_keys, items.target_keys)
    assert codes.code_layout.row_lengths == items.code_layout.row_lengths


def test_item_tables_shrink_to_a_small_one_that_nobody_looks_up() -> None:
    batch = collate(ROWS, TARGETS)
    assert batch.features.keys() == feature_names(EMBEDDING) == ["item_hash_0", "context_kind"]
    assert looked_up_features(EMBEDDING) == ["context_kind"]
    assert batch.features["item_hash_0"].values().numel() == 0
    assert batch.features["context_kind"].values().tolist() == [item % 2 for row in ROWS for item in row]
    sizes = {table.name: table.num_embeddings for table in item_tables(EMBEDDING, {"kind": 2}, torch.device("meta")).embedding_configs()}
    assert sizes == {"item_hash_0": 1024, "context_kind": 2}
    of_items = dataclasses.replace(EMBEDDING, tokens="items", num_hashes=3)
    assert looked_up_features(of_items) == feature_names(of_items) and len(feature_names(of_items)) == 4


@pytest.mark.parametrize("num_context", [0, 2])
def test_tokens_are_the_codes_of_each_event_in_order_with_its_context_on_the_first(num_context: int) -> None:
    torch.manual_seed(0)
    model = CodeInput(["item_hash_0", *"ab"[:num_context]], 1, 8, WIDTHS, 16)
    codes = torch.stack([torch.randint(0, width, (7,)) for width in WIDTHS], dim=1)
    context = [torch.randn(7, 8) for _ in range(num_context)]
    tokens = model([torch.zeros(0, 8), *context], codes).view(7, C, 16)
    for event in range(7):
        for level, embedding in enumerate(model.code_embeddings):
            assert isinstance(embedding, torch.nn.Embedding)
            expected = embedding.weight[codes[event, level]]
            if level == 0 and model.context_projection is not None:
                expected = expected + model.context_projection(torch.cat([rows[event] for rows in context]))
            assert relative_error(tokens[event, level], expected) < 1e-6
    assert (model.context_projection is None) == (num_context == 0)


def test_the_memory_of_a_row_does_not_depend_on_its_neighbours() -> None:
    retriever = retriever_of()
    together = retriever.encode(collate(ROWS, TARGETS)).memory
    for index, row in enumerate(ROWS):
        alone = retriever.encode(collate([row], [[1]])).memory
        begin, end = together.layout.offsets[index], together.layout.offsets[index + 1]
        assert end - begin == C * len(row)
        for packed, single in zip(together.key_values, alone.key_values, strict=True):
            assert not len(row) or relative_error(packed[begin:end], single) < 1e-6
    nll = retriever(collate(ROWS, TARGETS))[1]
    alone_nll = [retriever(collate([row], [targets]))[1] for row, targets in zip(ROWS, TARGETS, strict=True)]
    assert relative_error(nll, torch.cat(alone_nll)) < 1e-6


@pytest.mark.parametrize("tokens", ["codes", "items"])
def test_items_of_equal_codes_are_one_to_codes_and_two_to_items(tokens: Tokens) -> None:
    embedding = dataclasses.replace(EMBEDDING, tokens=tokens, rows_per_table=64)
    retriever = retriever_of(embedding)
    retriever.history.item_codes[12] = retriever.history.item_codes[11]
    retriever.history.item_codes[13] = (retriever.history.item_codes[11] + torch.tensor([0, 0, 1])) % torch.tensor(WIDTHS)

    def memory(item: int, kind: int = 0) -> Tensor:
        batch = collate([[1, item, 3]], [[2]], embedding, kinds=[0, kind, 0])
        return torch.stack(retriever.encode(batch).memory.key_values)

    assert torch.equal(memory(11), memory(12)) == (tokens == "codes")
    # one code of one level, or the context, changes what is remembered
    assert not torch.equal(memory(11), memory(13)) and not torch.equal(memory(11), memory(11, kind=1))


@pytest.mark.parametrize("context", [(), ("kind",)])
def test_gradients_reach_every_parameter_and_are_zero_where_nobody_looks(context: tuple[str, ...]) -> None:
    retriever = retriever_of(dataclasses.replace(EMBEDDING, context_features=context)).train()
    rows = [list(range(NUM_ITEMS)), [3, 4]]
    loss, _ = retriever(collate(rows, [list(range(NUM_ITEMS)), [1]], retriever.history.config.embedding))
    loss.backward()
    for name, parameter in retriever.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("item_hash_0" not in name), name


def test_no_events_give_zero_gradients_not_none() -> None:
    retriever = retriever_of().train()
    loss, nll = retriever(collate([[]], [[]]))
    loss.backward()
    assert nll.shape == (0,)
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in retriever.parameters())


def test_dropout_masks_of_the_codes_of_an_event_differ() -> None:
    embedding = dataclasses.replace(EMBEDDING, context_features=())
    retriever = retriever_of(embedding, pattern="S")
    encoder = retriever.history.encoder
    batch = collate([[1]], [[2]], embedding)
    layout = JaggedLayout.from_lengths([1] * C)
    encoder.blocks[0].dropout = 0.5
    # equal tokens, each a row of its own: what differs is the mask
    tokens = torch.ones(C, 16)
    masked = encoder.train()(tokens, layout.offsets, layout=layout, token_keys=batch.token_keys)
    assert len(torch.unique(masked, dim=0)) == C


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"EmbeddingConfig\.tokens must be one of"):
        EmbeddingConfig(tokens="words")  # type: ignore[arg-type]
