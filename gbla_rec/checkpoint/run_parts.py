"""Opens what a run is made of - dataset, semantic IDs, sharded model - for training, evaluation and recommendation."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel

from gbla_kernels.dispatch import INTERPRETED
from gbla_rec import workspace
from gbla_rec.checkpoint.cluster import Cluster
from gbla_rec.checkpoint.host_placement import HostPlacement, host_placement
from gbla_rec.checkpoint.plan_search import PlanRequest
from gbla_rec.checkpoint.process_group import require_process_group
from gbla_rec.checkpoint.semantic_ids_rule import require_semantic_ids, require_settings
from gbla_rec.checkpoint.sharding import planned_tables, sharded_retriever, table_kernels, unwrap
from gbla_rec.config import RunConfig, multiply_adds
from gbla_rec.data.batch import Batch, Collator
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.evaluation_batches import EvaluationSplit, evaluation_batches
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.data.item_queries import QueryMaker
from gbla_rec.models.autocast import autocast
from gbla_rec.models.retriever import GenerativeRetriever
from gbla_rec.semantic_ids.features import load_item_features
from gbla_rec.semantic_ids.identity import SemanticIdsIdentity
from gbla_rec.semantic_ids.table import SemanticIdTable, read_manifest

ITEMS_AT_ONCE = 1 << 16
"""Items whose vectors are looked up in one exchange."""


@dataclass(frozen=True, eq=False)
class RunParts:
    """Everything a run needs besides its weights' values; the model is freshly initialised."""

    config: RunConfig
    dataset: PreparedDataset
    semantic_ids: SemanticIdTable
    collator: Collator
    model: DistributedModelParallel
    device: torch.device
    identity: SemanticIdsIdentity

    @classmethod
    def open(cls, config: RunConfig, device: torch.device, run_dir: Path | None = None) -> "RunParts":
        """Open dataset and semantic IDs from the workspace and build the sharded model on the current process group.

        Args:
            config: of the run.
            device: of this rank.
            run_dir: of a trained run, whose semantic IDs they must be; None before there is one.

        Raises:
            FileNotFoundError: if the dataset is not prepared or not tokenized; the message names the command.
            ValueError: if the semantic IDs belong to another version of the dataset, were made with other settings, or are not those of
                ``run_dir``, if the device lacks the kernels that the config chooses, or if a rank has no memory for its part of the
                model.
            RuntimeError: without a process group.
        """
        _require_kernels(config, device)
        require_process_group("RunParts.open")
        dataset = PreparedDataset.open(workspace.dataset_dir(config.dataset))
        ids_dir = workspace.semantic_ids_dir(config.dataset)
        semantic_ids = SemanticIdTable.load(
            ids_dir,
            num_items=dataset.manifest.num_items,
            dataset_hash=dataset.manifest.content_hash,
        )
        manifest = read_manifest(ids_dir)
        require_settings(ids_dir, manifest, config)
        embedding = config.model.embedding
        identity = SemanticIdsIdentity.of(ids_dir, manifest, with_features=embedding.item_features)
        if run_dir is not None:
            require_semantic_ids(run_dir, identity)
        model = sharded_retriever(
            config.model,
            config.optimizer,
            dataset.context_sizes(),
            semantic_ids.codes,
            semantic_ids.widths,
            lookups_per_batch=config.lookups_per_batch,
            candidates_per_rank=config.candidates_per_rank(semantic_ids.num_items),
            seed=config.seed,
            device=device,
            item_features=torch.from_numpy(load_item_features(ids_dir, semantic_ids.num_items)) if embedding.item_features else None,
        )
        query_maker = None
        if config.model.has_item_head:
            query_maker = QueryMaker(config.model.item_head, semantic_ids.num_items, dataset.train_counts(), config.seed)
        collator = Collator(
            embedding,
            dataset.items()["item_id"].to_list(),
            num_code_levels=len(semantic_ids.widths),
            world_size=dist.get_world_size(),
            query_maker=query_maker,
        )
        return cls(config, dataset, semantic_ids, collator, model, device, identity)

    def host_placement(self) -> HostPlacement | None:
        """The tables that the planner put into host memory of its own accord; this rank finds them alone."""
        config = self.config
        tables = planned_tables(config.model.embedding, config.optimizer, self.dataset.context_sizes())
        request = PlanRequest(
            nn.ModuleDict({"tables": tables}),
            config.model.embedding,
            Cluster.current(self.device),
            config.lookups_per_batch,
            config.candidates_per_rank(self.semantic_ids.num_items),
        )
        return host_placement(request, table_kernels(self.model))

    @property
    def retriever(self) -> GenerativeRetriever:
        """The retriever inside the data-parallel wrappers."""
        return unwrap(self.model)

    def evaluation_batches(
        self,
        split: EvaluationSplit,
        tokens_per_batch: int,
        num_users: int | None = None,
        *,
        users_per_batch: int | None = None,
        with_queries: bool = True,
    ) -> Iterator[tuple[HistoryBatch, Batch]]:
        """This rank's part of the users of ``split``; every rank gets the same number of batches, some may be empty.

        Args:
            split: whose targets to predict; ``next`` has all events and no targets.
            tokens_per_batch: history events of one batch.
            num_users: a fixed random sample of users instead of all.
            users_per_batch: at most so many users in one batch.
            with_queries: whether batches have what the item-level head's loss needs; a search does without.
        """
        batches = evaluation_batches(
            self.dataset,
            split,
            tokens_per_batch=tokens_per_batch,
            max_history_length=self.config.stream.max_history_length,
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            users_per_batch=users_per_batch,
            num_users=num_users,
            seed=self.config.seed,
            context=self.config.model.embedding.context_features,
            costs=multiply_adds(self.config.model, self.semantic_ids.widths, self.config.stream.max_history_length),
            num_decoded=self.config.evaluation.num_beams,
        )
        for histories in batches:
            yield histories, self.collator(histories, with_queries=with_queries).to(self.device)

    def item_vectors(self) -> Tensor:
        """Vectors ``(N, D)``, fp32, of the whole catalogue for the item-level head; all ranks call it together."""
        vectors = []
        for items in torch.arange(self.semantic_ids.num_items).split(ITEMS_AT_ONCE):
            features = self.collator.item_features(items).to(self.device)
            with self.autocast():
                # fp32, as searches multiply them: one conversion, not one a batch
                vectors.append(self.retriever.item_vectors(features, items.to(self.device)).float())
        return torch.cat(vectors)

    def autocast(self) -> AbstractContextManager[object]:
        """bf16 on CUDA; fp32 on CPU, where bf16 is slower."""
        return autocast(self.device)


def _require_kernels(config: RunConfig, device: torch.device) -> None:
    """Triton kernels run on CUDA, and in Triton's interpreter."""
    if config.model.kernels == "triton" and device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"ModelConfig.kernels must be 'auto' or 'reference' without a CUDA device, got 'triton' on {device}; run on a GPU, or give "
            "--model.kernels auto (for a trained run: write it into the run's config.json, the weights are the same)"
        )
