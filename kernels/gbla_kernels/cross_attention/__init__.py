"""Softmax attention of few queries over the many keys of their row, jagged on both sides."""
