"""The training loss: negative log-likelihood of the targets' semantic IDs."""

# S targets, C code levels, W codebook width (docs/shapes.md)

import torch.nn.functional as F
from torch import Tensor


def semantic_id_nll(logits: list[Tensor], codes: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """``-log p(codes)`` of each target, in nats, summed over its levels.

    Args:
        logits: ``C`` tensors ``(S, W_level)``, any float dtype; computed in fp32.
        codes: ``(S, C)`` int64.
        label_smoothing: weight of the uniform distribution over a level's codes.

    Returns:
        ``(S,)`` fp32.
    """
    losses = [
        F.cross_entropy(level_logits.float(), codes[:, level], reduction="none", label_smoothing=label_smoothing)
        for level, level_logits in enumerate(logits)
    ]
    return sum(losses[1:], losses[0])
