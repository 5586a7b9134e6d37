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
    joint_beams: int = 500
    """Beams of the search whose items a model with both heads ranks by item-level score and log-probability together."""
    beam_weight: float = 1.0
    """Of the log-probability of an item's semantic ID beside its item-level score; 0 ranks the candidates by the latter alone."""

    def __post_init__(self) -> None:
        require_positive(self, "num_beams", "tokens_per_batch", "shortlist_users", "bootstrap_samples", "joint_beams")
        require(self.beam_weight >= 0, "EvaluationConfig.beam_weight", "not be negative", self.beam_weight)
        require(bool(self.cutoffs) and min(self.cutoffs) > 0, "EvaluationConfig.cutoffs", "be positive and not empty", self.cutoffs)
        require(
            max(self.cutoffs) <= self.num_beams,
            "EvaluationConfig.num_beams",
            "be at least the largest cutoff",
            (self.num_beams, self.cutoffs),
        )
