"""Kernels for hybrid sequence encoders over jagged batches; needs torch and triton only."""

from gbla_kernels.backend import Backend
from gbla_kernels.causal_conv1d.api import causal_conv1d
from gbla_kernels.layout import JaggedLayout
from gbla_kernels.linear_attention.api import gated_linear_attention

__all__ = ["Backend", "JaggedLayout", "causal_conv1d", "gated_linear_attention"]
