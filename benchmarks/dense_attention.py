"""The softmax-attention peers of dense batches: rows of one length, with torch's fused kernels forced one by one."""

# B rows, T tokens of a row, H heads, K head width, D model width (docs/shapes.md)

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gbla_rec.models.layers import initialized_linear

KERNELS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def dense_attention(kernel: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``op(query, key, value)`` on ``(B, H, T, K)``, by that kernel or not at all."""

    def op(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel([kernel]):
            return F.scaled_dot_product_attention(query, key, value)

    return op


class DenseSoftmaxLayer(nn.Module):
    """Projection, bidirectional softmax attention by one kernel, projection; without RoPE, which only slows it."""

    def __init__(self, model_dim: int, num_heads: int, kernel: SDPBackend) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attend = dense_attention(kernel)
        self.in_projection = initialized_linear(model_dim, 3 * model_dim)
        self.out_projection = initialized_linear(model_dim, model_dim)

    def forward(self, x: Tensor, num_rows: int) -> Tensor:
        """``(B * T, D)`` to ``(B * T, D)``."""
        heads = self.in_projection(x).view(num_rows, -1, 3, self.num_heads, x.shape[1] // self.num_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4).unbind(0)
        return self.out_projection(self.attend(query, key, value).transpose(1, 2).reshape(x.shape))
