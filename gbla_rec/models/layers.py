"""The two mixing layers of the hybrid encoder, with one signature, and the feed-forward layer."""

# B rows, L tokens, D model width, H heads, K = V = D / H head width, R conv taps (docs/shapes.md)

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gbla_kernels import Backend, JaggedLayout, causal_conv1d, gated_linear_attention_packed, rms_norm_causal_conv1d
from gbla_kernels.rotary.api import rotary_embedding
from gbla_rec.config import EncoderConfig
from gbla_rec.config.model import TRITON_MAX_FUSED_NORM_DIM
from gbla_rec.models.jagged_attention import jagged_attention

PROJECTION_MULTIPLE = 64
"""The fused projection is padded to this many columns, so that each of its views stays 16-byte aligned."""


def initialized_linear(in_dim: int, out_dim: int, *, scale: float = 1.0) -> nn.Linear:
    """A linear map without bias, normal with standard deviation ``scale / sqrt(in_dim)``."""
    linear = nn.Linear(in_dim, out_dim, bias=False)
    nn.init.normal_(linear.weight, std=scale * in_dim**-0.5)
    return linear


class RMSNorm(nn.RMSNorm):
    """``x * rsqrt(mean(x^2) + eps) * weight`` over the last dimension, computed in fp32, in the dtype of ``x``.

    Under autocast ``x`` is bf16 and the weight fp32: torch's fused kernel takes neither two dtypes, nor an ``eps`` that depends on one.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=torch.finfo(torch.float32).eps)

    def forward(self, x: Tensor) -> Tensor:
        """``x (..., D)``."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class GatedBidirectionalLinearAttention(nn.Module):
    """Conv, one fused projection, gated linear attention, output projection (arXiv 2606.07317).

    Each of the paper's parts has a switch in ``EncoderConfig``: conv, key_gate, output_gate, direction. Given the norm of a pre-norm
    block, TRITON runs norm and conv as one kernel, which reads the norm's weight and eps and does not call it.
    """

    def __init__(self, config: EncoderConfig, *, output_scale: float = 1.0, backend: Backend) -> None:
        super().__init__()
        dim, heads = config.model_dim, config.num_heads
        self.config, self.backend = config, backend
        self.head_dim = dim // heads
        self.conv_weight = nn.Parameter(torch.zeros(dim, config.conv_width)) if config.conv else None
        self.conv_bias = nn.Parameter(torch.zeros(dim)) if config.conv else None
        if self.conv_weight is not None:
            nn.init.normal_(self.conv_weight, std=0.5 / config.conv_width)
            with torch.no_grad():
                self.conv_weight[:, -1] += 1
        self.widths = [dim, dim, dim, dim if config.output_gate else 0, heads if config.key_gate else 0]
        columns = sum(self.widths)
        self.widths.append(-columns % PROJECTION_MULTIPLE)
        self.in_projection = initialized_linear(dim, columns + self.widths[-1])
        self.norm_weight = nn.Parameter(torch.ones(heads, self.head_dim))
        self.out_projection = initialized_linear(dim, dim, scale=output_scale)

    def forward(self, x: Tensor, layout: JaggedLayout, *, norm: RMSNorm | None = None) -> Tensor:
        """``(L, D)`` to ``(L, D)``; rows are those of ``layout``. ``norm``: of a pre-norm block, applied to ``x`` first."""
        y = gated_linear_attention_packed(
            self.in_projection(self._convolved(x, layout, norm)),
            self.norm_weight,
            layout.offsets,
            num_heads=self.config.num_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            key_gate=self.config.key_gate,
            output_gate=self.config.output_gate,
            layout=layout,
            feature_map=self.config.feature_map,
            direction=self.config.direction,
            backend=self.backend,
        )
        return self.out_projection(y.flatten(1))  # type: ignore[no-any-return]

    def _convolved(self, x: Tensor, layout: JaggedLayout, norm: RMSNorm | None) -> Tensor:
        if self.conv_weight is None:
            return x if norm is None else norm(x)
        conv = (self.conv_weight, self.conv_bias, layout.offsets)
        if norm is not None and self.backend is Backend.TRITON and x.shape[1] <= TRITON_MAX_FUSED_NORM_DIM:
            # the normed values never reach memory; wider tokens do not fit the registers of a program
            return rms_norm_causal_conv1d(x, norm.weight, *conv, eps=norm.eps, layout=layout, backend=self.backend)
        return causal_conv1d(x if norm is None else norm(x), *conv, layout=layout, backend=self.backend)


class SoftmaxAttention(nn.Module):
    """Multi-head softmax attention with RoPE over each row; bidirectional unless the config says causal.

    ``backend`` chooses how queries and keys are turned: by one fused kernel, or by torch. The attention itself runs the kernel that
    ``jagged_attention`` documents, on either backend.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        window: int | None = None,
        output_scale: float = 1.0,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.config, self.window, self.backend = config, window, backend
        self.head_dim = config.model_dim // config.num_heads
        self.in_projection = initialized_linear(config.model_dim, 3 * config.model_dim)
        self.out_projection = initialized_linear(config.model_dim, config.model_dim, scale=output_scale)

    def forward(self, x: Tensor, layout: JaggedLayout, *, norm: RMSNorm | None = None) -> Tensor:
        """``(L, D)`` to ``(L, D)``; rows are those of ``layout``. ``norm``: of a pre-norm block, applied to ``x`` first."""
        x = x if norm is None else norm(x)
        query, key, value = self.in_projection(x).view(x.shape[0], 3, self.config.num_heads, self.head_dim).unbind(1)
        query, key = rotary_embedding(query, key, layout.positions, base=self.config.rope_base, backend=self.backend)
        is_causal = self.config.direction == "causal"
        y = jagged_attention(query, key, value, layout, layout, is_causal=is_causal, window=self.window)
        return self.out_projection(y.flatten(1))  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """``W_out (silu(W_gate x) * W_value x)`` (Shazeer, arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden_dim: int, *, output_scale: float = 1.0) -> None:
        super().__init__()
        self.in_projection = initialized_linear(dim, 2 * hidden_dim)
        self.out_projection = initialized_linear(hidden_dim, dim, scale=output_scale)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` to ``(..., D)``."""
        gate, value = self.in_projection(x).chunk(2, dim=-1)
        return self.out_projection(F.silu(gate) * value)  # type: ignore[no-any-return]
