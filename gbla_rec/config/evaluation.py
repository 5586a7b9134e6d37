"""Beam search and metrics."""

from dataclasses import dataclass

from gbla_rec.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Full-catalogue beam search and its metrics."""

    num_beams: int = 50
    cutoffs: tuple[int, ...] = (5, 10, 50)
    exclude_history: bool = False
    """Never recommend an item of the user's own history; the baselines obey it too."""
    tokens_per_batch: int = 65_536
    shortlist_users: int = 1_024
    """Validation users on whom beam search chooses among the shortlisted checkpoints."""
    bootstrap_samples: int = 2_000

    def __post_init__(self) -> None:
        require_positive(self, "num_beams", "tokens_per_batch", "shortlist_users", "bootstrap_samples")
        require(bool(self.cutoffs) and min(self.cutoffs) > 0, "EvaluationConfig.cutoffs", "be positive and not empty", self.cutoffs)
        require(
            max(self.cutoffs) <= self.num_beams,
            "EvaluationConfig.num_beams",
            "be at least the largest cutoff",
            (self.num_beams, self.cutoffs),
        )
