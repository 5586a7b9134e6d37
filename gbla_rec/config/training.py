"""Optimisers, and the length of a run."""

import re
from dataclasses import dataclass

from gbla_rec.config.rules import require, require_positive


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Fused row-wise Adagrad for the tables, AdamW with warm-up and cosine decay for the rest."""

    table_learning_rate: float = 0.05
    """Of row-wise Adagrad, the same in all steps."""
    table_eps: float = 1e-8
    learning_rate: float = 1e-3
    """Of AdamW, after the warm-up."""
    weight_decay: float = 0.01
    """Of AdamW, on matrices only."""
    beta1: float = 0.9
    beta2: float = 0.98
    warmup_steps: int = 100
    """Steps in which the learning rate of AdamW rises to its full value."""
    final_learning_rate_fraction: float = 0.05
    """Of ``learning_rate``, at the end of the cosine, which is the last step."""
    clip_grad_norm: float = 1.0
    """Global norm of the dense gradients; the fused tables step inside backward and are not clipped."""

    def __post_init__(self) -> None:
        require_positive(self, "table_learning_rate", "table_eps", "learning_rate", "clip_grad_norm")
        require(self.weight_decay >= 0, "OptimizerConfig.weight_decay", "not be negative", self.weight_decay)
        for name, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            require(0 <= beta < 1, f"OptimizerConfig.{name}", "lie in [0, 1)", beta)
        final = self.final_learning_rate_fraction
        require(0 <= final <= 1, "OptimizerConfig.final_learning_rate_fraction", "lie in [0, 1]", final)
        require(self.warmup_steps >= 0, "OptimizerConfig.warmup_steps", "not be negative", self.warmup_steps)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingConfig:
    """Length of a run, and when it validates, logs and saves."""

    num_steps: int = 10_000
    """Steps of the optimisers, each with one global batch."""
    validate_every: int = 1_000
    """Steps from one validation to the next."""
    validation_users: int = 1_024
    """A fixed sample of users (drawn from the seed) whose NLL says which checkpoints are the best."""
    save_every: int = 1_000
    """Steps from one checkpoint to the next."""
    keep_last: int = 2
    """Newest checkpoints to keep; evaluation chooses among all that are kept."""
    keep_best: int = 2
    """Checkpoints of lowest validation NLL to keep."""
    async_save: bool = False
    """Train on while a checkpoint is written; needs host memory for a second copy of each rank's weights and moments."""
    log_every: int = 10
    """Steps from one report to the next."""
    num_micro_batches: int = 1
    """Gradient accumulation: a global batch is cut into so many micro batches, each of which the ranks share, and which run one after
    another in less memory. The dense part steps once, with the gradient of the whole batch; the fused tables step in the backward of
    each micro batch."""
    prefetch_factor: int = 4
    """Global batches that a background thread reads, plans and collates ahead of the step."""
    compile: bool = False
    """torch.compile of the dense part (encoder, decoder, loss), with symbolic sizes: it compiles for each choice of
    kernels, not for each length."""
    profile_steps: str | None = None
    """``first:count`` or ``first``: steps (1 is the run's first) whose Chrome trace rank 0 writes into the run directory; None
    profiles nothing."""

    def __post_init__(self) -> None:
        require_positive(self, "num_steps", "validate_every", "validation_users", "save_every", "keep_last", "keep_best", "log_every")
        require_positive(self, "num_micro_batches", "prefetch_factor")
        is_range = self.profile_steps is None or re.fullmatch(r"[1-9]\d*(:[1-9]\d*)?", self.profile_steps) is not None
        require(is_range, "TrainingConfig.profile_steps", "be 'first' or 'first:count', both at least 1", self.profile_steps)

    @property
    def profiled_steps(self) -> range:
        """The steps of ``profile_steps``."""
        if self.profile_steps is None:
            return range(0)
        first, _, count = self.profile_steps.partition(":")
        return range(int(first), int(first) + int(count or 1))
