"""The catalogue of a run to plan: of its prepared dataset, or assumed."""

from gbla_rec import workspace
from gbla_rec.checkpoint.cluster_plan import Catalogue
from gbla_rec.config import RunConfig
from gbla_rec.data.dataset import PreparedDataset
from gbla_rec.semantic_ids.features import feature_dim
from gbla_rec.semantic_ids.quantizer import default_codebook_width
from gbla_rec.semantic_ids.table import read_manifest

CONTEXT_VALUES = 1_000
"""Assumed of a context column whose dataset is not prepared."""


def known_catalogue(config: RunConfig, num_items: int | None = None) -> tuple[Catalogue, str]:
    """The catalogue of a run, and a sentence that says where it comes from.

    Args:
        config: the run.
        num_items: plan for so many items; None takes the prepared dataset's, or else the rows of one table.
    """
    path = workspace.dataset_dir(config.dataset)
    if path.exists():
        dataset = PreparedDataset.open(path)
        sizes, known, source = dataset.context_sizes(), dataset.manifest.num_items, f"dataset {config.dataset} in {path}"
    else:
        sizes, known = dict.fromkeys(config.model.embedding.context_features, CONTEXT_VALUES), config.model.embedding.rows_per_table
        columns = f", and {CONTEXT_VALUES:,} values of each context column" if sizes else ""
        source = f"dataset {config.dataset} is not prepared: items as many as rows of a table, or as given{columns}"
    items = num_items if num_items is not None else known
    widths = _code_widths(config, items, is_known=num_items is None)
    text = f"{source}; {items:,} items, codes {' x '.join(map(str, widths))}"
    catalogue = Catalogue(
        num_items=items,
        context_sizes=sizes,
        code_widths=widths,
        feature_dim=_feature_dim(config),
        item_source="option" if num_items is not None else "dataset" if path.exists() else "rows_per_table",
    )
    return catalogue, text


def _code_widths(config: RunConfig, num_items: int, *, is_known: bool) -> tuple[int, ...]:
    ids_dir = workspace.semantic_ids_dir(config.dataset)
    if is_known and ids_dir.exists():
        return tuple(read_manifest(ids_dir)["widths"])
    ids = config.semantic_ids
    width = ids.codebook_width or default_codebook_width(num_items, ids.min_codebook_width)
    return (*[width] * ids.num_levels, ids.dedup_width)


def _feature_dim(config: RunConfig) -> int:
    """Width of the item features that the model reads: as tokenized, or at most so wide."""
    if not config.model.embedding.item_features:
        return 0
    tokenized = feature_dim(workspace.semantic_ids_dir(config.dataset))
    ids = config.semantic_ids
    return tokenized or ids.embedding_dim * (2 if ids.embedding == "text_and_behaviour" else 1)
