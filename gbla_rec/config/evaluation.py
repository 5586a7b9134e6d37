"""Beam search and metrics."""

import math
from dataclasses import dataclass

from gbla_rec.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Full-catalogue beam search and its metrics."""

    num_beams: int = 50
    """Of the search that ranks by the log-probability of semantic IDs."""
    cutoffs: tuple[int, ...] = (5, 10, 50)
    """The ``k`` of Recall@k and NDCG@k."""
    exclude_history: bool = False
    """Never recommend an item of the user's own history; the baselines obey it too. This decides the main figures."""
    both_histories: bool = False
    """Also evaluate the other way of ``exclude_history``, in a second column, at the cost of one more beam search."""
    beam_sweep: tuple[int, ...] = ()
    """Also test with these numbers of beams, one row each; checkpoints are chosen at ``num_beams`` all the same."""
    history_edges: tuple[int, ...] = ()
    """Slices of users by the events before the targets begin at these lengths. Empty: powers of two or more, by the data."""
    cold_edges: tuple[int, ...] = (1, 6)
    """Slices of users by the training events of the (rarest) target begin at these: the default gives 0, 1-5 and 6+."""
    tokens_per_batch: int = 65_536
    """History events of the users that a rank evaluates at a time."""
    shortlist_users: int = 1_024
    """Validation users on whom beam search chooses among the shortlisted checkpoints."""
    bootstrap_samples: int = 2_000
    """Resampled sets of users, from which intervals are taken."""
    joint_beams: int = 500
    """Beams of the search whose items a model with both heads ranks by item-level score and log-probability together;
    ``num_beams`` if that is more."""
    beam_weight: float = 1.0
    """Of the log-probability of an item's semantic ID beside its item-level score; 0 ranks the candidates by the latter alone."""

    def __post_init__(self) -> None:
        require_positive(self, "num_beams", "tokens_per_batch", "shortlist_users", "bootstrap_samples", "joint_beams")
        require(0 <= self.beam_weight < math.inf, "EvaluationConfig.beam_weight", "be finite and not negative", self.beam_weight)
        require(bool(self.cutoffs) and min(self.cutoffs) > 0, "EvaluationConfig.cutoffs", "be positive and not empty", self.cutoffs)
        for name in ("beam_sweep", "history_edges", "cold_edges"):
            values = getattr(self, name)
            rises = all(low < high for low, high in zip((0, *values), values, strict=False))
            require(rises, f"EvaluationConfig.{name}", "rise from above 0", values)
        require(
            max(self.cutoffs) <= self.num_beams,
            "EvaluationConfig.num_beams",
            "be at least the largest cutoff",
            (self.num_beams, self.cutoffs),
        )
