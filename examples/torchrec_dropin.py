"""An existing TorchRec model gets the hybrid encoder by eight changed lines, and its old checkpoint still loads.

``NextItemModel`` is the kind of model that many teams run: their own KeyedJaggedTensor batches, an EmbeddingCollection,
DistributedModelParallel and TorchRec's train pipeline; it averages the history. The lines marked ``# changed`` are all
that the hybrid encoder needs; its parameter ``encoder`` is there because one file holds both models, with it and without,
and ``process_group`` stands for what a team starts its ranks with. The encoder's row lengths are read back from the device
here; a collate that makes a ``JaggedLayout`` saves that (docs/api.md).
Run it alone or on several ranks, for about half a minute on a CPU::

    python examples/torchrec_dropin.py
    python -m torch.distributed.run --standalone --nproc-per-node 2 examples/torchrec_dropin.py

The result is its last two lines; the warnings before them are TorchRec's own, about planners that are left at their defaults.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, JaggedTensor, KeyedJaggedTensor
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad
from torchrec.streamable import Pipelineable

from gbla_kernels import Backend  # changed
from gbla_rec.checkpoint.process_group import on_first_rank, process_group
from gbla_rec.models.embeddings import encode_jagged  # changed
from gbla_rec.models.encoder import EncoderConfig, HybridEncoder  # changed

NUM_ITEMS, DIM, ROWS_PER_BATCH, NUM_STEPS = 100, 32, 32, 200


@dataclass
class SessionBatch(Pipelineable):
    """The team's own batch: the items of each session so far, and the item that came next, ``(B,)``."""

    sessions: KeyedJaggedTensor
    next_item: Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> "SessionBatch":
        """The batch on ``device``."""
        return SessionBatch(self.sessions.to(device, non_blocking=non_blocking), self.next_item.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "SessionBatch":
        """The batch in page-locked memory."""
        return SessionBatch(self.sessions.pin_memory(), self.next_item.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep device memory until ``stream`` has passed this point."""
        self.sessions.record_stream(stream)
        self.next_item.record_stream(stream)


class NextItemModel(nn.Module):
    """Embeds a session, averages it, scores every item by a linear layer."""

    def __init__(self, encoder: HybridEncoder | None = None) -> None:
        super().__init__()
        table = EmbeddingConfig(name="item", embedding_dim=DIM, num_embeddings=NUM_ITEMS, feature_names=["item"])
        self.tables = EmbeddingCollection(tables=[table], device=torch.device("meta"))
        self.head = SessionHead(encoder)

    def forward(self, batch: SessionBatch) -> tuple[Tensor, Tensor]:
        """Loss, and the number of sessions whose next item scored highest."""
        return self.head(self.tables(batch.sessions)["item"], batch.next_item)  # type: ignore[no-any-return]


class SessionHead(nn.Module):
    """Everything after the table."""

    def __init__(self, encoder: HybridEncoder | None) -> None:
        super().__init__()
        self.score, self.encoder = nn.Linear(DIM, NUM_ITEMS), encoder

    def forward(self, history: JaggedTensor, next_item: Tensor) -> tuple[Tensor, Tensor]:
        """See ``NextItemModel``."""
        if self.encoder is not None:
            history = encode_jagged(self.encoder, history)  # changed
        rows = torch.repeat_interleave(history.lengths())
        mean = torch.zeros(next_item.shape[0], DIM, device=rows.device).index_add(0, rows, history.values())
        scores = self.score(mean / history.lengths()[:, None].clamp(min=1))
        return F.cross_entropy(scores, next_item), (scores.argmax(dim=-1) == next_item).sum()


def sessions(seed: int) -> Iterator[SessionBatch]:
    """Sessions in which the *newest* item decides the next one, so an average alone cannot tell."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        lengths = torch.randint(1, 12, (ROWS_PER_BATCH,), generator=generator)
        items = torch.randint(0, NUM_ITEMS, (int(lengths.sum()),), generator=generator)
        newest = items[lengths.cumsum(0) - 1]
        yield SessionBatch(KeyedJaggedTensor(keys=["item"], values=items, lengths=lengths), (newest * 7 + 1) % NUM_ITEMS)


def shard(model: NextItemModel, device: torch.device) -> DistributedModelParallel:
    """The team's own sharding and optimiser of the table."""
    apply_optimizer_in_backward(RowWiseAdagrad, model.tables.parameters(), {"lr": 0.1})
    return DistributedModelParallel(model, device=device, sharders=[EmbeddingCollectionSharder()])


def train(model: DistributedModelParallel, device: torch.device) -> float:
    """The team's own loop; returns the share of hits in the last quarter."""
    dense = [parameter for name, parameter in model.named_parameters() if "tables" not in name]
    pipeline = TrainPipelineSparseDist(model, torch.optim.AdamW(dense, lr=3e-3), device)
    batches = sessions(seed=dist.get_rank())
    hits = [int(pipeline.progress(batches)) for _ in range(NUM_STEPS)][-NUM_STEPS // 4 :]
    pipeline.detach()
    return sum(hits) / (len(hits) * ROWS_PER_BATCH)


def main() -> None:
    """Train without the encoder, save, load that checkpoint into the model with the encoder, train on."""
    torch.manual_seed(0)
    # so little work: several threads would wait for each other
    torch.set_num_threads(1)
    with process_group() as device:
        directory = on_first_rank(lambda: tempfile.mkdtemp())
        checkpoint = Path(directory, "before")
        before = shard(NextItemModel(), device)
        hits_before = train(before, device)
        dcp.save({"model": before.state_dict()}, checkpoint_id=checkpoint)

        config = EncoderConfig(model_dim=DIM, num_heads=4, pattern="SGG")  # changed
        backend = Backend.TRITON if device.type == "cuda" else Backend.REFERENCE  # changed
        after = shard(NextItemModel(HybridEncoder(config, backend=backend)), device)  # changed
        state = {"model": after.state_dict()}
        dcp.load(state, checkpoint_id=checkpoint, planner=dcp.DefaultLoadPlanner(allow_partial_load=True))  # changed
        after.load_state_dict(state["model"])
        hits_after = train(after, device)
        if dist.get_rank() == 0:
            old, new = set(before.state_dict()), set(after.state_dict())
            print(f"old checkpoint: {len(old)} tensors, all loaded: {old <= new}; new in the model: {len(new - old)} of the encoder")
            print(f"next item first: {hits_before:.1%} averaging the session, {hits_after:.1%} with the hybrid encoder")


if __name__ == "__main__":
    main()
