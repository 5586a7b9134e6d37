"""How good a table of semantic IDs is: collisions, and how much of each codebook is used."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.semantic_ids.table import SemanticIdTable

NUM_LARGEST = 5
NUM_EXAMPLES = 3
MAX_TEXT = 80


def quality_report(
    table: SemanticIdTable,
    *,
    source: str,
    titles: pl.Series | None = None,
    num_without_embedding: int | None = None,
    residual_energy: list[float] | None = None,
) -> dict[str, Any]:
    """Figures of ``table``, ready for JSON.

    Args:
        table: all items.
        source: what the embeddings were made from, for the reader.
        titles: ``(N,)`` a text per item, shown for the most crowded prefixes; an item whose text is blank is shown by its id.
        num_without_embedding: items whose vector is zero; None if unknown.
        residual_energy: per level, the fraction of squared length left over.
    """
    codes = table.codes.cpu().numpy()
    energy: list[float | None] = list(residual_energy) if residual_energy is not None else []
    energy += [None] * (table.num_levels - len(energy))
    return {
        "num_items": table.num_items,
        "widths": list(table.widths),
        "source": source,
        "num_without_embedding": num_without_embedding,
        "before_dedup": _collisions(codes[:, :-1]),
        "after_dedup": _collisions(codes),
        "levels": [{**_usage(codes[:, level], table.widths[level]), "residual_energy": energy[level]} for level in range(table.num_levels)],
        "largest_prefixes": _largest_prefixes(table, codes, titles),
    }


def write_report(report: dict[str, Any], directory: Path) -> None:
    """Write ``report.json`` and ``report.md``."""
    (directory / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(_markdown(report), encoding="utf-8")


def _groups(codes: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the group of equal rows that each row is in, and the size of each group."""
    if codes.shape[1] == 0:
        return np.zeros(len(codes), dtype=np.int64), np.array([len(codes)])
    _, inverse, counts = np.unique(codes, axis=0, return_inverse=True, return_counts=True)
    return inverse, counts


def _collisions(codes: NDArray[np.int64]) -> dict[str, Any]:
    """``num_shared`` counts the IDs that several items have, ``items_sharing`` those items."""
    _, sizes = _groups(codes)
    sharing = int(sizes[sizes > 1].sum())
    return {
        "num_distinct": len(sizes),
        "num_shared": int((sizes > 1).sum()),
        "items_sharing": sharing,
        "fraction_sharing": sharing / len(codes),
        "largest": int(sizes.max()),
    }


def _usage(codes: NDArray[np.int64], width: int) -> dict[str, Any]:
    counts = np.bincount(codes, minlength=width)
    probabilities = counts[counts > 0] / len(codes)
    # + 0.0: one code in use has entropy 0, not -0
    entropy = float(-(probabilities * np.log2(probabilities)).sum()) + 0.0
    return {
        "width": width,
        "codes_used": int((counts > 0).sum()),
        "usage": float((counts > 0).mean()),
        "entropy_bits": entropy,
        "entropy_fraction": entropy / np.log2(width) if width > 1 else 1.0,
        "largest_code": int(counts.max()),
    }


def _largest_prefixes(table: SemanticIdTable, codes: NDArray[np.int64], titles: pl.Series | None) -> list[dict[str, Any]]:
    group, sizes = _groups(codes[:, :-1])
    largest = np.lexsort((np.arange(len(sizes)), -sizes))[:NUM_LARGEST]
    found = []
    for number in largest[sizes[largest] > 1]:
        items = np.flatnonzero(group == number)
        examples = items[:NUM_EXAMPLES].tolist()
        item_ids = [table.item_ids[item] if table.item_ids is not None else item for item in examples]
        shown = None
        if titles is not None:
            named = [(titles[item] or "").strip() or str(item_id) for item, item_id in zip(examples, item_ids, strict=True)]
            shown = [name[:MAX_TEXT] for name in named]
        found.append({"prefix": codes[items[0], :-1].tolist(), "num_items": len(items), "item_ids": item_ids, "titles": shown})
    return found


def _markdown(report: dict[str, Any]) -> str:
    before, after = report["before_dedup"], report["after_dedup"]
    lines = [
        "# Semantic IDs: quality",
        "",
        f"{report['num_items']:,} items from {report['source']}; codebooks {' x '.join(map(str, report['widths']))} (the last tells apart "
        "items of one prefix).",
        "",
        "| | before de-duplication | after |",
        "|---|---|---|",
        f"| distinct IDs | {before['num_distinct']:,} | {after['num_distinct']:,} |",
        f"| IDs of several items | {before['num_shared']:,} | {after['num_shared']:,} |",
        f"| items that share their ID | {before['items_sharing']:,} ({before['fraction_sharing']:.1%}) "
        f"| {after['items_sharing']:,} ({after['fraction_sharing']:.1%}) |",
        f"| items of the most crowded ID | {before['largest']:,} | {after['largest']:,} |",
        "",
        "| level | codes used | entropy (bits) | of log2(width) | items of the largest code | squared length left over |",
        "|---|---|---|---|---|---|",
    ]
    for number, level in enumerate(report["levels"]):
        left = "" if level["residual_energy"] is None else f"{level['residual_energy']:.1%}"
        name = f"{number}" if number + 1 < len(report["levels"]) else f"{number} (de-duplication)"
        lines.append(
            f"| {name} | {level['codes_used']:,} of {level['width']:,} | {level['entropy_bits']:.2f} | {level['entropy_fraction']:.1%} "
            f"| {level['largest_code']:,} | {left} |"
        )
    if report["num_without_embedding"]:
        count = report["num_without_embedding"]
        lines += ["", f"**{count:,} items have no embedding** (no text, or no training events): their codes say nothing about them."]
    if after["items_sharing"]:
        lines += [
            "",
            f"**{after['items_sharing']:,} items share an ID**: the de-duplication level overflowed. The model cannot tell them apart; "
            "raise dedup_width or give them better embeddings.",
        ]
    if report["largest_prefixes"]:
        lines += ["", "Most crowded prefixes:", ""]
    for prefix in report["largest_prefixes"]:
        shown = prefix["titles"] if prefix["titles"] is not None else prefix["item_ids"]
        lines.append(f"- {tuple(prefix['prefix'])}: {prefix['num_items']:,} items, e.g. " + "; ".join(map(str, shown)))
    return "\n".join(lines) + "\n"
