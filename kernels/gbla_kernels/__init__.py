"""Kernels for hybrid sequence encoders over jagged batches; needs torch and triton only."""

from gbla_kernels.backend import Backend
from gbla_kernels.causal_conv1d.api import causal_conv1d
from gbla_kernels.cross_attention.api import jagged_cross_attention, jagged_cross_attention_packed
from gbla_kernels.keyed_dropout.api import keyed_dropout
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.api import gated_linear_attention, gated_linear_attention_packed
from gbla_kernels.rms_norm_causal_conv1d.api import rms_norm_causal_conv1d
from gbla_kernels.rotary.api import rotary_embedding

__all__ = [
    "Backend",
    "JaggedLayout",
    "causal_conv1d",
    "gated_linear_attention",
    "gated_linear_attention_packed",
    "jagged_cross_attention",
    "jagged_cross_attention_packed",
    "keyed_dropout",
    "rms_norm_causal_conv1d",
    "rotary_embedding",
]
