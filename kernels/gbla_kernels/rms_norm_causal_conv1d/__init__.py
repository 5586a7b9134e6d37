"""RMSNorm and depthwise causal convolution over jagged batches, in one pass."""
