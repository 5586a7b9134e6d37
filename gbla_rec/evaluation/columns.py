"""One column of an evaluation - the history kept, or removed - for all users and by slices, and the rows of a beam sweep."""

# U users (docs/shapes.md)

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from gbla_rec.config import EvaluationConfig
from gbla_rec.evaluation.per_user import History
from gbla_rec.evaluation.rank import RankedUsers, Score
from gbla_rec.evaluation.slices import UserSlice, logarithmic_edges, rarest_target_events, slices_at
from gbla_rec.evaluation.summaries import Summaries, UserValues, summarise, summarise_slices

Int64Array = NDArray[np.int64]


def history_name(exclude_history: bool) -> History:
    """What a column is called."""
    return "removed" if exclude_history else "kept"


@dataclass(frozen=True, eq=False)
class EvaluatedUsers:
    """Who was evaluated, all ``(U,)`` in the dataset's order, and the slices that they fall into."""

    user_rows: Int64Array
    history_lengths: Int64Array
    rarest_target_events: Int64Array
    by_history: list[UserSlice]
    by_target: list[UserSlice]

    @classmethod
    def of(cls, ranked: RankedUsers, train_counts: Int64Array, config: EvaluationConfig) -> "EvaluatedUsers":
        """The users of a ranking; ``train_counts`` ``(N,)`` are the training events of the items."""
        rarest = rarest_target_events(ranked.targets, ranked.target_offsets, train_counts)
        edges = config.history_edges or logarithmic_edges(ranked.history_lengths)
        return cls(
            user_rows=ranked.user_rows,
            history_lengths=ranked.history_lengths,
            rarest_target_events=rarest,
            by_history=slices_at(ranked.history_lengths, edges),
            by_target=slices_at(rarest, config.cold_edges),
        )

    def frame(self) -> pl.DataFrame:
        """One row a user, with the labels of the slices."""
        return pl.DataFrame(
            {
                "user_row": self.user_rows,
                "history_length": self.history_lengths,
                "rarest_target_events": self.rarest_target_events,
                "history_slice": _labels(self.by_history, len(self.user_rows)),
                "cold_slice": _labels(self.by_target, len(self.user_rows)),
            }
        )


def column_results(per_user: UserValues, users: EvaluatedUsers, num_samples: int) -> dict[str, Any]:
    """``methods`` of all users, and ``slices`` by ``history_length`` and ``rarest_target_events``."""
    slicings = {"history_length": users.by_history, "rarest_target_events": users.by_target}
    return {
        "methods": summarise(per_user, num_samples),
        "slices": {name: summarise_slices(per_user, slices, num_samples) for name, slices in slicings.items()},
    }


def sweep_results(rankings: Mapping[Score, RankedUsers], names: Mapping[Score, str], num_beams: int, config: EvaluationConfig) -> Summaries:
    """Method -> metric -> mean and interval at one number of beams; cutoffs above it are left out, as beams cannot fill them.

    Only the generative score: the item-level one has no beams, and the joint one has ``joint_beams``, whatever this number is.
    """
    cutoffs = tuple(cutoff for cutoff in config.cutoffs if cutoff <= num_beams)
    if not cutoffs or "generative" not in rankings:
        return {}
    return summarise({names["generative"]: rankings["generative"].metrics(cutoffs)}, config.bootstrap_samples)


def _labels(slices: list[UserSlice], num_users: int) -> list[str]:
    labels = np.full(num_users, "", dtype=object)
    for part in slices:
        labels[part.members] = part.label
    return list(labels)
