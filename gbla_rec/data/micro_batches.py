"""How a global batch is cut into micro batches for gradient accumulation, before ranks share each of them."""

# B rows (docs/shapes.md)

import numpy as np

from gbla_rec.data.histories import Int64Array


def micro_batch_of_rows(lengths: Int64Array, num_targets: Int64Array, num_micro_batches: int) -> Int64Array:
    """Cut the rows of a global batch, longest first, into micro batches of about as many events and targets each.

    Long histories share micro batches: in each, all ranks wait for the one that has the longest. A micro batch ends with the row whose
    middle is nearest below its even share of what is left, so it exceeds that share by half a row at most. The cut depends on sizes
    only, not on costs or ranks, so any number of ranks feeds the tables the same micro batches.

    Args:
        lengths: ``(B,)`` int64 memory events of each row.
        num_targets: ``(B,)`` int64 targets of each row.
        num_micro_batches: parts. With fewer rows than parts the first ``B`` get one row each and the others none; else none is empty.

    Returns:
        ``(B,)`` int64 micro batch of each row.
    """
    micro_batches = np.zeros(len(lengths), np.int64)
    if num_micro_batches == 1:
        return micro_batches
    sizes = np.maximum(lengths + num_targets, 1)
    order = np.argsort(-sizes, kind="stable")
    ends = np.cumsum(sizes[order])
    # twice the middle of each row, in integers: the same cut on every machine
    middles = 2 * ends - sizes[order]
    first, done = 0, 0
    for micro_batch in range(num_micro_batches):
        if first == len(order):
            break
        parts_left = num_micro_batches - micro_batch
        share_end = (2 * (int(ends[-1]) - done)) // parts_left + 2 * done
        stop = len(order) if parts_left == 1 else max(first + 1, int(np.searchsorted(middles, share_end, side="right")))
        micro_batches[order[first:stop]] = micro_batch
        first, done = stop, int(ends[stop - 1])
    return micro_batches
