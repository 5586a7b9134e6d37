"""Recommendations with titles, for a user of the dataset or for a history given by titles or ids."""

import difflib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch

from gbla_rec.checkpoint.process_group import on_first_rank
from gbla_rec.checkpoint.run_directory import CHECKPOINTS, PROGRESS, RESULTS, Checkpoint, best_checkpoints, checkpoints, read_config
from gbla_rec.checkpoint.run_parts import RunParts
from gbla_rec.checkpoint.storage import load_checkpoint
from gbla_rec.data.histories import HistoryBatch
from gbla_rec.evaluation.rank import Score, Search, scores_of, search_batch
from gbla_rec.semantic_ids.trie import PrefixTrie

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recommendation:
    """Ranked items: original ids, titles (the id where there is none) and scores: by ``generative`` they are log-probabilities in nats."""

    history_titles: list[str]
    item_ids: list[int] | list[str]
    titles: list[str]
    scores: list[float]
    ranked_by: Score


class Recommender:
    """A trained run, ready to recommend; a context column that a typed-in history lacks gets its most frequent value."""

    def __init__(self, parts: RunParts, score: Score | None = None) -> None:
        """Prepare a catalogue to search.

        Args:
            parts: the run, with trained weights.
            score: what items are ranked by; None takes the model's main score.

        Raises:
            ValueError: if the model has no such score.
        """
        known = scores_of(parts.config.model)
        if score is not None and score not in known:
            raise ValueError(
                f"score must be one of the model's scores {known}, got {score!r}; ModelConfig.objective says what a run is trained for"
            )
        self.parts, self.score = parts, score or known[0]
        self.items = parts.dataset.items()
        text_columns = parts.dataset.manifest.text_columns
        ids = self.items["item_id"].cast(pl.String)
        titles = self.items[text_columns[0]] if text_columns else ids
        self.titles: list[str] = [title if title and title.strip() else str(item) for title, item in zip(titles, ids, strict=True)]
        self.vectors = parts.item_vectors() if parts.config.model.has_item_head else None
        self.trie = PrefixTrie.from_codes(parts.semantic_ids.codes, parts.semantic_ids.widths).to(parts.device)

    @classmethod
    def open(cls, run_dir: Path, device: torch.device, score: Score | None = None) -> "Recommender":
        """Load the checkpoint that evaluation chose; before evaluation, or with a warning if it is gone, that of lowest validation NLL."""
        parts = RunParts.open(read_config(run_dir), device, run_dir)
        load_checkpoint(on_first_rank(lambda: _chosen_checkpoint(run_dir)), parts.model, None)
        return cls(parts, score)

    def for_user(self, user_id: str, count: int, *, exclude_history: bool = True) -> Recommendation:
        """Recommend to a user of the dataset after all of their events.

        Raises:
            ValueError: if the user is unknown.
        """
        is_integer = self.parts.dataset.manifest.user_id_type == "int64"
        if is_integer and not user_id.removeprefix("-").isdecimal():
            raise ValueError(f"user_id (--user) must be an integer, as in the dataset, got {user_id!r}")
        history = self.parts.dataset.history(int(user_id) if is_integer else user_id)
        return self._recommend(history.items, history.context, count, exclude_history)

    def for_history(self, history: str, count: int, *, exclude_history: bool = True) -> Recommendation:
        """Recommend after a history of titles or ids, oldest first, separated by commas (a title may contain commas).

        Raises:
            ValueError: if an entry names no item or several; the message suggests titles.
        """
        items = np.array(self._resolve([part.strip() for part in history.split(",")]), dtype=np.int64)
        return self._recommend(items, {}, count, exclude_history)

    def _recommend(self, items: np.ndarray, context: dict[str, np.ndarray], count: int, exclude_history: bool) -> Recommendation:
        config = self.parts.config
        recent = slice(max(len(items) - config.stream.max_history_length, 0), None)
        read = items[recent]
        histories = HistoryBatch.of_lengths(
            read,
            [len(read)],
            context={
                column: context[column][recent] if column in context else np.full(len(read), self._usual_code(column), dtype=np.int32)
                for column in config.model.embedding.context_features
            },
            seen_items=items,
            seen_lengths=[len(items)],
        )
        self.parts.model.eval()
        with self.parts.autocast():
            encoded = self.parts.retriever.encode(self.parts.collator(histories, with_queries=False).to(self.parts.device))
            search = Search(max(config.evaluation.num_beams, count), exclude_history, self.score)
            result = search_batch(self.parts, self.trie, histories, encoded, self.vectors, search, count)[self.score]
        ranked = [item for item in result.items[0].tolist() if item >= 0]
        return Recommendation(
            history_titles=[self.titles[item] for item in items],
            item_ids=self.items["item_id"].gather(ranked).to_list(),
            titles=[self.titles[item] for item in ranked],
            scores=result.scores[0, : len(ranked)].tolist(),
            ranked_by=self.score,
        )

    def _usual_code(self, column: str) -> int:
        """The most frequent code of a context column in the first shard."""
        codes = self.parts.dataset.read_shard(0, [column]).context[column]
        return int(np.bincount(codes).argmax())

    def _resolve(self, parts: list[str]) -> list[int]:
        """Item indices of comma-separated entries; neighbouring entries are joined while that names an item."""
        if not any(parts):
            raise ValueError("history must name at least one item, by its title or id, got none")
        found, start = [], 0
        while start < len(parts):
            for stop in range(len(parts), start, -1):
                name = ", ".join(parts[start:stop])
                matches = self._matches(name)
                if len(matches) == 1:
                    found.append(matches[0])
                    start = stop
                    break
            else:
                raise ValueError(self._no_match(parts[start]))
        return found

    def _matches(self, name: str) -> list[int]:
        """Items with this id or title (case and a trailing ``(year)`` aside); several when it is ambiguous."""
        ids = self.items["item_id"].cast(pl.String)
        by_id = (ids == name).arg_true().to_list()
        if by_id:
            return by_id
        wanted = name.casefold()
        exact = [i for i, title in enumerate(self.titles) if title.casefold() == wanted]
        return exact or [i for i, title in enumerate(self.titles) if title.casefold().rpartition(" (")[0] == wanted]

    def _no_match(self, name: str) -> str:
        matches = self._matches(name)
        if matches:
            named = ", ".join(f"{self.titles[i]} (id {self.items['item_id'][i]})" for i in matches[:5])
            return f"history entry {name!r} names several items: {named}; give the full title or the id"
        similar = difflib.get_close_matches(name, self.titles, n=3, cutoff=0.4)
        containing = [title for title in self.titles if name.casefold() in title.casefold()][:3]
        near = list(dict.fromkeys([*containing, *similar]))[:5]
        cure = f"did you mean one of {near}?" if near else f"give titles or ids of {self.parts.dataset.path}, e.g. {self.titles[:3]}"
        return f"history entry {name!r} names no item of the dataset; {cure}"


def _chosen_checkpoint(run_dir: Path) -> Checkpoint:
    chosen = _evaluated_name(run_dir)
    by_name = {checkpoint.path.name: checkpoint for checkpoint in checkpoints(run_dir)}
    if chosen in by_name:
        return by_name[chosen]
    if chosen is not None and (run_dir / CHECKPOINTS / chosen).exists():
        raise ValueError(
            f"checkpoint {run_dir / CHECKPOINTS / chosen}, at which {run_dir} was evaluated, is damaged: it has no {PROGRESS}; restore the "
            "file, or remove the checkpoint to recommend by another one"
        )
    best = best_checkpoints(run_dir, 1)[0]
    if chosen is not None:
        logger.warning(
            "%s was evaluated at checkpoint %s, which is gone; recommending by %s, of the lowest validation NLL, which may not have been "
            "tested; evaluate again: gbla-rec evaluate --run-dir %s",
            run_dir,
            chosen,
            best.path.name,
            run_dir,
        )
    return best


def _evaluated_name(run_dir: Path) -> str | None:
    """The checkpoint that the evaluation of a run chose; None before one."""
    path = run_dir / RESULTS
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_text())["checkpoint"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); evaluate again: gbla-rec evaluate --run-dir {run_dir}") from error
