"""How large a checkpoint will be: its bytes, the bytes of one rank, its files and its metadata."""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gbla_rec.checkpoint.shard_size import FLOAT_BYTES, moment_bytes, row_bytes
from gbla_rec.checkpoint.table_plan import TablePlan

DENSE_MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""What AdamW keeps of each dense parameter."""


@dataclass(frozen=True)
class CheckpointSize:
    """Bytes of one checkpoint, and who writes them.

    Attributes:
        table_rows: rows of all tables.
        table_optimizer: one moment a row and column shard.
        dense: dense weights and AdamW's moments, written once.
        largest_rank: bytes of the rank that writes most; the ranks share the dense part.
        data_files: one for each rank that holds something.
        metadata: bytes of ``.metadata``, which rank 0 gathers and every rank reads.
    """

    table_rows: int
    table_optimizer: int
    dense: int
    largest_rank: int
    data_files: int
    metadata: int

    @property
    def total(self) -> int:
        """Bytes of all files, ``progress.json`` aside."""
        return self.table_rows + self.table_optimizer + self.dense + self.metadata


def checkpoint_size(plan: TablePlan, dense_shapes: Mapping[str, torch.Size]) -> CheckpointSize:
    """The size of a checkpoint of the planned tables and dense parameters of these shapes, from the shapes alone."""
    world_size = plan.request.cluster.world_size
    rows, moments = [0] * world_size, [0] * world_size
    for option in plan.options:
        for shard in option.shards:
            assert shard.rank is not None
            rows[shard.rank] += row_bytes(*shard.size)
            moments[shard.rank] += moment_bytes(shard.size[0])
    # a step count is one number
    dense = sum(shape.numel() * FLOAT_BYTES * 3 + FLOAT_BYTES for shape in dense_shapes.values())
    return CheckpointSize(
        table_rows=sum(rows),
        table_optimizer=sum(moments),
        dense=dense,
        largest_rank=max(own_rows + own_moments for own_rows, own_moments in zip(rows, moments, strict=True)) + dense // world_size,
        data_files=min(world_size, sum(own > 0 for own in rows) + len(dense_shapes) * (1 + len(DENSE_MOMENTS))),
        metadata=_metadata_bytes(_metadata(plan, dense_shapes)),
    )


def _metadata_bytes(metadata: Metadata) -> int:
    # part by part: the parts come from different ranks, so that pickle finds no object twice
    return sum(len(pickle.dumps(part)) for part in (metadata.state_dict_metadata, metadata.planner_data, metadata.storage_data))


def _metadata(plan: TablePlan, dense_shapes: Mapping[str, torch.Size]) -> Metadata:
    """What torch.distributed.checkpoint will write as ``.metadata``: an entry and a place for every shard of every tensor."""
    tensors: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    files = [f"__{rank}_0.distcp" for rank in range(plan.request.cluster.world_size)]
    written = [0] * len(files)

    def add(name: str, shape: torch.Size, chunks: list[tuple[torch.Size, torch.Size, int]]) -> None:
        properties = TensorProperties(dtype=torch.float32)
        pieces = [ChunkStorageMetadata(offsets=offset, sizes=size) for offset, size, _ in chunks]
        tensors[name] = TensorStorageMetadata(properties=properties, size=shape, chunks=pieces)
        for index, (offset, size, rank) in enumerate(chunks):
            length = size.numel() * FLOAT_BYTES
            places[MetadataIndex(name, offset, index)] = _StorageInfo(files[rank], written[rank], length)
            written[rank] += length

    for option in plan.options:
        name, shape = f"tables.embeddings.{option.name}.weight", option.tensor.shape
        shards = [(torch.Size(shard.offset), torch.Size(shard.size), shard.rank or 0) for shard in option.shards]
        add(f"model.{name}", shape, shards)
        moments = [(offset[:1], size[:1], rank) for offset, size, rank in shards]
        add(f"table_optimizer.state.{name}.{option.name}.momentum1", shape[:1], moments)
    for name, shape in dense_shapes.items():
        for entry in (f"model.{name}", *(f"dense_optimizer.{name}.{moment}" for moment in DENSE_MOMENTS)):
            add(entry, shape, [(torch.Size([0] * len(shape)), shape, 0)])
    return Metadata(state_dict_metadata=tensors, planner_data={name: tuple(name.split(".", 1)) for name in tensors}, storage_data=places)
