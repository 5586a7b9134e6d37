"""Semantic IDs: item embeddings, residual k-means, the table of codes and its prefix trie."""
