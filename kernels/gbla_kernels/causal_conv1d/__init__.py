"""Depthwise causal convolution over jagged batches."""
