"""Bytes of a shard of a table: in memory while training, and in a checkpoint."""

FLOAT_BYTES = 4
"""Tables, moments and dense weights are fp32."""


def row_bytes(rows: int, columns: int) -> int:
    """Bytes of the rows of a shard."""
    return FLOAT_BYTES * rows * columns


def moment_bytes(rows: int) -> int:
    """Bytes of its optimiser: row-wise Adagrad keeps one moment for each row of a shard."""
    return FLOAT_BYTES * rows
