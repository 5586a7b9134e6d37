"""The whole job: a prepared dataset's items get semantic IDs, and later items join without moving published ones."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray

from gbla_rec.config import SemanticIdConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.data.new_directory import new_directory
from gbla_rec.semantic_ids.embeddings import embedding_source, fit_embedder, load_embedder, save_embedder
from gbla_rec.semantic_ids.features import save_item_features
from gbla_rec.semantic_ids.identity import EXTENDS, generation
from gbla_rec.semantic_ids.quantizer import ResidualQuantizer, dedup_slots, default_codebook_width
from gbla_rec.semantic_ids.report import quality_report, write_report
from gbla_rec.semantic_ids.table import SemanticIdTable, read_manifest

NUM_NAMED = 5


def tokenize(dataset: PreparedDataset, config: SemanticIdConfig, output: Path) -> SemanticIdTable:
    """Embed, quantise and number all items of ``dataset``; write table, codebooks, embedder, item features and report to ``output``.

    Args:
        dataset: its items, and for behaviour embeddings its training events (never validation or test events).
        config: settings; ``seed`` makes the result repeatable on one machine.
        output: a directory that does not exist yet; it appears whole or not at all.

    Raises:
        FileExistsError: if ``output`` exists.
        ValueError: if the dataset lacks what the embedding reads, or an embedding file is malformed.
        ModuleNotFoundError: if an optional text encoder is not installed.
    """
    # what was chosen is what is written down
    config = dataclasses.replace(config, embedding=embedding_source(dataset, config))
    with new_directory(output) as directory:
        embedder = fit_embedder(dataset, config)
        embeddings = embedder.embed(dataset)
        width = config.codebook_width or default_codebook_width(len(embeddings), config.min_codebook_width)
        quantizer = ResidualQuantizer.fit(
            embeddings,
            num_levels=config.num_levels,
            width=width,
            iterations=config.kmeans_iterations,
            seed=config.seed,
            balance=config.balance,
        )
        prefixes = quantizer.encode_together(embeddings, balance=config.balance, distinct_last_code=config.distinct_last_code)
        codes = np.column_stack([prefixes, dedup_slots(prefixes, config.dedup_width)])
        widths = (*[width] * config.num_levels, config.dedup_width)
        save_embedder(embedder, directory)
        quantizer.save(directory)
        settings = dataclasses.asdict(config)
        return _write(directory, dataset, codes, widths, settings, embeddings, quantizer)


def append_items(directory: Path, dataset: PreparedDataset, output: Path, *, embedding_file: Path | None = None) -> SemanticIdTable:
    """Give the new items of ``dataset`` semantic IDs from the frozen codebooks of ``directory``.

    Items are matched by item id. Every published item keeps its codes bit for bit; a new item takes the next free slot
    of its prefix, or shares an ID when the de-duplication level is full. Item *indices* follow the new dataset.

    Args:
        directory: published semantic IDs; only read.
        dataset: prepared anew; holds every published item, and more.
        output: a directory that does not exist yet.
        embedding_file: vectors of all items of ``dataset``, exactly when the published IDs came from a file.

    Raises:
        FileExistsError: if ``output`` exists.
        FileNotFoundError: if there are no semantic IDs in ``directory``.
        ValueError: if a published item is missing in ``dataset``, or the embedder refuses.
    """
    published = SemanticIdTable.load(directory)
    manifest = read_manifest(directory)
    settings = manifest["config"]
    if settings is None:
        raise ValueError(f"{directory} holds a bare table without codebooks; items can only be appended to what `tokenize` wrote")
    rows = _published_rows(published, dataset, directory)
    with new_directory(output) as temporary:
        embedder = load_embedder(directory, embedding_file)
        embeddings = embedder.embed(dataset)
        quantizer = ResidualQuantizer.load(directory, published.num_levels - 1)
        is_new = rows < 0
        new_prefixes = quantizer.encode(embeddings[is_new])
        old_codes = published.codes.numpy()
        # published rows first: their number under a prefix is the first slot of the new ones
        slots = dedup_slots(np.concatenate([old_codes[:, :-1], new_prefixes]), published.widths[-1])[len(old_codes) :]
        codes = np.empty((len(rows), published.num_levels), dtype=np.int64)
        codes[~is_new] = old_codes[rows[~is_new]]
        codes[is_new] = np.column_stack([new_prefixes, slots])
        save_embedder(embedder, temporary)
        quantizer.save(temporary)
        lineage = {EXTENDS: [generation(manifest), *manifest.get(EXTENDS, [])]}
        return _write(temporary, dataset, codes, published.widths, settings, embeddings, quantizer, lineage)


def _published_rows(published: SemanticIdTable, dataset: PreparedDataset, directory: Path) -> NDArray[np.int64]:
    """``(N,)``: the row of each item of ``dataset`` in the published table, -1 for a new item."""
    ids = dataset.items()["item_id"]
    assert published.item_ids is not None
    if published.item_ids.dtype != ids.dtype:
        raise ValueError(f"{dataset.path}: item_id must be {published.item_ids.dtype} as in {directory}, got {ids.dtype}")
    table = pl.DataFrame({"item_id": published.item_ids, "row": np.arange(published.num_items)})
    lost = table.filter(~pl.col("item_id").is_in(ids.implode()))["item_id"].to_list()
    if lost:
        raise ValueError(
            f"{dataset.path}: must hold every item of {directory}, {len(lost)} are missing: item_id {lost[:NUM_NAMED]}; "
            "prepare it with an item table that keeps retired items"
        )
    joined = pl.DataFrame({"item_id": ids}).join(table, on="item_id", how="left", maintain_order="left")
    return joined["row"].fill_null(-1).to_numpy()


def _write(
    directory: Path,
    dataset: PreparedDataset,
    codes: NDArray[np.int64],
    widths: tuple[int, ...],
    settings: dict[str, Any],
    embeddings: NDArray[np.float32],
    quantizer: ResidualQuantizer,
    lineage: dict[str, Any] | None = None,
) -> SemanticIdTable:
    items = dataset.items()
    table = SemanticIdTable(torch.from_numpy(codes), widths, items["item_id"])
    columns = dataset.manifest.text_columns
    encoder = f" ({settings['text_encoder']})" if settings["embedding"] in ("text", "text_and_behaviour") else ""
    report = quality_report(
        table,
        source=f"{settings['embedding']}{encoder} embeddings of dataset {dataset.manifest.name}, {embeddings.shape[1]} wide",
        titles=items[columns[0]] if columns else None,
        num_without_embedding=int((~embeddings.any(axis=1)).sum()),
        residual_energy=quantizer.residual_energy(embeddings, codes[:, :-1]),
    )
    write_report(report, directory)
    save_item_features(embeddings, directory)
    table.write_files(directory, dataset_hash=dataset.manifest.content_hash, config=settings, lineage=lineage)
    return table
