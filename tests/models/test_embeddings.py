"""The tables: initial weights and hashed rows are pure functions of seed and id; a JaggedTensor passes through the encoder."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.distributed.types import LazyAwaitable
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from gbla_kernels import Backend, JaggedLayout
from gbla_rec.config import EmbeddingConfig, EncoderConfig
from gbla_rec.models.embeddings import encode_jagged, initialize_tables, item_tables
from gbla_rec.models.encoder import HybridEncoder

CONFIG = EmbeddingConfig(num_hashes=2, rows_per_table=5000, dim=16, context_features=("kind",))


def test_a_width_that_fbgemm_refuses_is_refused_before_there_are_tables() -> None:
    with pytest.raises(ValueError, match=r"EmbeddingConfig\.dim must be a multiple of 4, .*, got 6"):
        EmbeddingConfig(dim=6)


def test_tables_are_one_per_hash_and_context_column() -> None:
    tables = item_tables(CONFIG, {"kind": 3, "unused": 4}, torch.device("cpu"))
    sizes = {config.name: (config.num_embeddings, config.embedding_dim) for config in tables.embedding_configs()}
    assert sizes == {"item_hash_0": (5000, 16), "item_hash_1": (5000, 16), "context_kind": (3, 16)}


def test_unknown_context_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context_features must be context columns of the dataset \['color'\], got \['kind'\]"):
        item_tables(CONFIG, {"color": 3}, torch.device("cpu"))


def test_initial_weights_are_centred_and_depend_on_seed_and_table() -> None:
    weights = []
    for seed in (0, 0, 1):
        tables = item_tables(CONFIG, {"kind": 3}, torch.device("cpu"))
        initialize_tables(tables, seed)
        weights.append({name: tensor.clone() for name, tensor in tables.state_dict().items()})
    first, again, other = weights
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name])
        assert not torch.equal(tensor, other[name])
    table = first["embeddings.item_hash_0.weight"]
    assert abs(float(table.mean())) < 0.01
    assert float(table.std()) == pytest.approx(0.25, rel=0.02)
    assert not torch.equal(table[:3], first["embeddings.context_kind.weight"])
    assert table.unique().numel() > 0.9 * table.numel()


def test_encode_jagged_keeps_the_rows() -> None:
    encoder = HybridEncoder(EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16), backend=Backend.REFERENCE)
    history = JaggedTensor(values=torch.randn(5, 16), lengths=torch.tensor([2, 0, 3]))
    encoded = encode_jagged(encoder, history)
    assert encoded.lengths().tolist() == [2, 0, 3]
    assert torch.equal(encoded.values(), encoder(history.values(), history.offsets()))


def test_what_is_no_jagged_tensor_is_refused() -> None:
    encoder = HybridEncoder(EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16), backend=Backend.REFERENCE)
    history = JaggedTensor(values=torch.randn(5, 16), lengths=torch.tensor([2, 0, 3]))
    layout = JaggedLayout.from_lengths([2, 0, 3])
    keyed = KeyedJaggedTensor(keys=["item"], values=torch.arange(5), lengths=torch.tensor([2, 0, 3]))
    wrong: tuple[Any, ...] = (history.values(), {"item": history}, [2, 0, 3], None, layout, keyed)
    for given in wrong:
        with pytest.raises(ValueError, match=rf"^history must be a JaggedTensor, got {type(given).__name__}; .*encoder\(values, offsets\)"):
            encode_jagged(encoder, given)


def test_what_stands_for_a_jagged_tensor_is_taken() -> None:
    encoder = HybridEncoder(EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16), backend=Backend.REFERENCE)
    history = JaggedTensor(values=torch.randn(5, 16), lengths=torch.tensor([2, 0, 3]))
    expected = encode_jagged(encoder, history).values()

    class Awaited(LazyAwaitable[JaggedTensor]):  # type: ignore[misc]
        def _wait_impl(self) -> JaggedTensor:
            return history

    # as of sharded tables
    assert torch.equal(encode_jagged(encoder, Awaited()).values(), expected)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def forward(self, history: JaggedTensor) -> Tensor:
            return encode_jagged(self.encoder, history).values()  # type: ignore[no-any-return]

    class Leaves(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return True

    # as where a training pipeline looks for the tables
    around = Around()
    traced = torch.fx.GraphModule(around, Leaves().trace(around))
    assert torch.equal(traced(history), expected)


def test_dropout_in_training_asks_for_its_keys_and_follows_them() -> None:
    encoder = HybridEncoder(EncoderConfig(model_dim=16, num_heads=2, pattern="SG", ffn_dim=16, dropout=0.5), backend=Backend.REFERENCE)
    history = JaggedTensor(values=torch.randn(5, 16), lengths=torch.tensor([2, 0, 3]))
    with pytest.raises(ValueError, match=r"token_keys must be given in training with EncoderConfig.dropout = 0.5, got None"):
        encode_jagged(encoder, history)
    keys = torch.arange(5)
    first, again, other = (encode_jagged(encoder, history, token_keys=drawn).values() for drawn in (keys, keys, keys + 5))
    assert torch.equal(first, again) and not torch.equal(first, other)
    encoder.eval()
    assert torch.equal(encode_jagged(encoder, history).values(), encode_jagged(encoder, history, token_keys=keys).values())
