"""What the steps since the last report add up to."""

import time
from dataclasses import dataclass, field

from torch import Tensor

from gbla_rec.data.batch import Batch


@dataclass
class StepWindow:
    """Sums since the last report; the NLL stays on the device until then."""

    nll: Tensor
    """fp32 scalar, in nats, of this rank's targets."""
    targets: int = 0
    tokens: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, batch: Batch, nll: Tensor) -> None:
        """Count one step: its global batch, and the NLL ``(S,)`` of this rank's targets."""
        self.nll += nll.sum()
        self.targets += batch.num_global_targets
        self.tokens += batch.num_global_tokens
