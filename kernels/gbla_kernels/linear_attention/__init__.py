"""Gated bidirectional linear attention over jagged batches (arXiv 2606.07317)."""
