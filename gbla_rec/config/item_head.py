"""The item-level head: whole items scored against one query vector of a history."""

from dataclasses import dataclass
from typing import Literal

from gbla_rec.config.rules import require, require_choice, require_positive

ItemLoss = Literal["softmax", "bce"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemHeadConfig:
    """How the item-level head is trained; ``ModelConfig.objective`` says whether there is one."""

    loss: ItemLoss = "softmax"
    """``softmax``: cross-entropy over items; ``bce``: each target against its own uniform negatives, the loss of SASRec
    (Kang and McAuley, arXiv 1808.09781)."""
    weight: float = 1.0
    """Of this loss beside the generative one, where the objective is ``joint``."""
    num_sampled: int = 0
    """Negatives of the softmax, one set for a global batch, log-Q corrected; 0 takes the whole catalogue. Of ``bce``: negatives of each
    target, at least 1."""
    sampling_power: float = 0.5
    """Negatives of a sampled softmax are drawn in proportion to ``(training events of the item + 1) ** sampling_power``."""
    every_position: bool = False
    """Every event of a history predicts the next one, as SASRec is trained; only for causal encoders that have no other objective.
    The newest event predicts the first target of a cut and further ones are left out: it goes with ``StreamConfig.targets_per_cut`` 1."""
    label_smoothing: float = 0.0
    """Weight of the uniform distribution over the candidates of a softmax."""

    def __post_init__(self) -> None:
        require_choice(self, "loss", ItemLoss)
        require_positive(self, "weight")
        require(self.num_sampled >= 0, "ItemHeadConfig.num_sampled", "not be negative", self.num_sampled)
        require(
            self.loss == "softmax" or self.num_sampled > 0, "ItemHeadConfig.num_sampled", "be positive with loss='bce'", self.num_sampled
        )
        require(self.sampling_power >= 0, "ItemHeadConfig.sampling_power", "not be negative", self.sampling_power)
        require(0 <= self.label_smoothing < 1, "ItemHeadConfig.label_smoothing", "lie in [0, 1)", self.label_smoothing)
        is_defined = self.label_smoothing == 0 or (self.loss == "softmax" and self.num_sampled == 0)
        require(is_defined, "ItemHeadConfig.label_smoothing", "be 0 unless the softmax is over the whole catalogue", self.label_smoothing)
