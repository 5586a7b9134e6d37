"""The sharded side of the model: multi-hash item tables and context tables in a TorchRec EmbeddingCollection."""

# L tokens, D model width (docs/shapes.md)

import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor
from torchrec.modules.embedding_configs import EmbeddingConfig as TableConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from gbla_kernels import JaggedLayout
from gbla_kernels.keyed_dropout.reference import mix64, wrap64
from gbla_rec.config import EmbeddingConfig
from gbla_rec.data.batch import context_feature, feature_names, hash_feature
from gbla_rec.models.encoder import HybridEncoder

FILL_ROWS = 1 << 16
"""Rows initialised at once: bounds the memory of initialising a large shard."""


def item_tables(config: EmbeddingConfig, context_sizes: Mapping[str, int], device: torch.device) -> EmbeddingCollection:
    """One table per hash function and per context column.

    Args:
        config: number, rows and width of the tables.
        context_sizes: values of each context column of the dataset.
        device: ``torch.device("meta")`` when the tables will be sharded.

    Raises:
        ValueError: if a context feature of the config is not in the dataset.
    """
    missing = sorted(set(config.context_features) - set(context_sizes))
    if missing:
        raise ValueError(f"EmbeddingConfig.context_features must be context columns of the dataset {sorted(context_sizes)}, got {missing}")
    rows = {hash_feature(i): config.rows_per_item_table for i in range(config.num_item_tables)}
    rows |= {context_feature(column): context_sizes[column] for column in config.context_features}
    tables = [
        TableConfig(name=name, embedding_dim=config.dim, num_embeddings=rows[name], feature_names=[name]) for name in feature_names(config)
    ]
    return EmbeddingCollection(tables=tables, device=device)


@torch.no_grad()
def initialize_tables(tables: nn.Module, seed: int) -> None:
    """Fill the tables, sharded or not, so that an element depends on (seed, table, row, column) and not on the sharding.

    Uniform with standard deviation ``dim ** -0.5``.
    """
    for name, parameter in tables.state_dict().items():
        table_key = mix64(torch.tensor(wrap64((seed << 32) + zlib.crc32(name.split(".")[-2].encode()))))
        for local, first_row, first_column, width in _local_shards(parameter):
            bound = (3 / width) ** 0.5
            columns = torch.arange(first_column, first_column + local.shape[1], device=local.device)
            for start in range(0, local.shape[0], FILL_ROWS):
                block = local[start : start + FILL_ROWS]
                row_keys = mix64(torch.arange(block.shape[0], device=local.device) + first_row + start + table_key.to(local.device))
                bits = mix64(row_keys[:, None] + columns) & ((1 << 24) - 1)
                block.copy_((bits.to(torch.float32) + 0.5) * (2 * bound / (1 << 24)) - bound)


def _local_shards(parameter: object) -> Iterator[tuple[Tensor, int, int, int]]:
    """This rank's pieces of a table: (tensor, first row, first column, width of the whole table)."""
    if isinstance(parameter, ShardedTensor):
        for shard in parameter.local_shards():
            row, column = shard.metadata.shard_offsets
            yield shard.tensor, row, column, parameter.size(1)
    elif isinstance(parameter, DTensor):
        raise NotImplementedError("tables must be ShardedTensors or plain tensors, got a DTensor")
    else:
        assert isinstance(parameter, Tensor)
        yield parameter, 0, 0, parameter.shape[1]


def encode_jagged(
    encoder: HybridEncoder, history: JaggedTensor, *, layout: JaggedLayout | None = None, token_keys: Tensor | None = None
) -> JaggedTensor:
    """Run the encoder on a TorchRec ``JaggedTensor``; the result has the same rows, and weights of the input are left out.

    Args:
        encoder: the hybrid encoder.
        history: embedded histories, as an ``EmbeddingCollection`` returns them: values ``(L, D)``, oldest first in each row, in
            the dtype of the encoder, or any float dtype under autocast.
        layout: the rows of ``history``; without it the offsets are read by the host (a device sync on CUDA).
        token_keys: ``(L,)`` int64 for dropout, needed in training where ``EncoderConfig.dropout`` is above 0.

    Raises:
        ValueError: if ``history`` is no ``JaggedTensor``, or as ``HybridEncoder.forward``.
    """
    _require_jagged(history)
    encoded = encoder(history.values(), history.offsets(), layout=layout, token_keys=token_keys)
    return JaggedTensor(values=encoded, lengths=history.lengths(), offsets=history.offsets())


def _require_jagged(history: object) -> None:
    # not isinstance(history, JaggedTensor): sharded tables return an awaitable of one, and a tracer a proxy
    is_one_feature = hasattr(history, "values") and hasattr(history, "offsets") and not isinstance(history, KeyedJaggedTensor)
    if isinstance(history, Tensor) or not is_one_feature:
        raise ValueError(
            f"history must be a JaggedTensor, got {type(history).__name__}; give JaggedTensor(values=..., lengths=...) or, of what an "
            "EmbeddingCollection returns, one feature; a tensor goes to encoder(values, offsets)"
        )
