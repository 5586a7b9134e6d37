"""The index of each token inside its row, for calls that come without a layout."""

# B rows, L tokens (docs/shapes.md)

import torch
from torch import Tensor

from gbla_kernels.layout import JaggedLayout


def token_positions(offsets: Tensor, layout: JaggedLayout | None, num_tokens: int) -> Tensor:
    """``(L,)`` int64 on the device of ``offsets (B + 1,)``: those of the layout, or computed there without a host synchronisation."""
    if layout is not None:
        return layout.positions
    tokens = torch.arange(num_tokens, device=offsets.device)
    # `right`: an empty row starts where the next one does, and has no token
    rows = torch.searchsorted(offsets, tokens, right=True) - 1
    return tokens - offsets[rows]
