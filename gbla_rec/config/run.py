"""One run, complete."""

from dataclasses import dataclass, field

from gbla_rec.config.data import StreamConfig
from gbla_rec.config.evaluation import EvaluationConfig
from gbla_rec.config.model import ModelConfig
from gbla_rec.config.rules import require, require_plain_name
from gbla_rec.config.semantic_ids import SemanticIdConfig
from gbla_rec.config.training import OptimizerConfig, TrainingConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """One training run, complete: dataset, semantic IDs, model, stream, optimiser, evaluation."""

    name: str
    """Name of the run's directory in the workspace; evaluate and recommend find it by this name."""
    dataset: str
    """Name of a prepared dataset in the workspace."""
    seed: int = 0
    """Of the initial weights, the order of samples and dropout."""
    semantic_ids: SemanticIdConfig = field(default_factory=SemanticIdConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        for argument, value in (("name", self.name), ("dataset", self.dataset)):
            require_plain_name(f"RunConfig.{argument}", value)
        has_query = not self.model.has_item_head or self.stream.min_history_length > 0
        require(has_query, "StreamConfig.min_history_length", "be positive where items are scored: an empty history has no query", 0)

    @property
    def lookups_per_batch(self) -> int:
        """Items that the ranks look up among them for a global batch, for estimates: its events, and what is asked for each."""
        events, head = self.stream.tokens_per_batch, self.model.item_head
        if not self.model.has_item_head or head.num_sampled == 0:
            return events
        # an item asked for each event, at most where a cut has fewer targets than events
        return events * (2 + (head.num_sampled if head.loss == "bce" else 0))

    def candidates_per_rank(self, num_items: int) -> int:
        """Items that every rank looks up for itself in each batch: the catalogue of ``num_items``, or negatives that all share."""
        head = self.model.item_head
        if not self.model.has_item_head or head.loss == "bce":
            return 0
        return head.num_sampled or num_items
