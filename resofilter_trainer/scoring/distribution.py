"""Which process takes which units of work. Knows costs and counts; does not know devices or models.

    units, most expensive first -> chunks of neighbours, smaller and smaller -> a free process takes the next chunk

Guided self-scheduling (Polychronopoulos and Kuck, 1987): a slow process takes fewer chunks, and the last chunks are
single units, so that no process waits long for it. Neighbours stay together because they may share work.
"""

from __future__ import annotations

import numpy as np

PER_PROCESS = (
    16  # what is left makes at least so many chunks for each process; more than 10, as one may be 10 times slower
)
MOST = 16.0  # units of average cost in a chunk; a request for the next chunk takes a fraction of a millisecond


def guided_chunks(costs: np.ndarray, processes: int) -> list[slice]:
    """Chunks of units of work, to be taken one after another.

    Args:
        costs: (N,) the cost of each unit, in any measure, such as tokens.
        processes: the number of processes that take chunks, at least 1.

    Returns:
        Slices that cover 0..N. A chunk costs at most 1 / (16 * processes) of what is left when it is taken, and at most
        as much as 16 average units; but it has at least one unit.
    """
    until = np.cumsum(np.maximum(np.asarray(costs, dtype=np.float64), 0.0))
    chunks, start, done = [], 0, 0.0
    while start < len(until):
        share = (until[-1] - done) / (PER_PROCESS * processes)
        most = min(share, MOST * until[-1] / len(until))
        stop = max(int(np.searchsorted(until, done + most, side="right")), start + 1)
        chunks.append(slice(start, stop))
        start, done = stop, float(until[stop - 1])
    return chunks


def rounds(costs: np.ndarray, processes: int) -> list[np.ndarray]:
    """Rounds in which every process takes one unit of work, for processes that must keep in step.

    Args:
        costs: (N,) the cost of each unit.
        processes: the number of processes, P.

    Returns:
        Arrays of P units each: units of similar cost together, the most expensive first. A last round with too few
        units repeats its first one, whose repeated results do not count.
    """
    order = np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable")
    missing = -len(order) % processes
    order = np.concatenate([order, np.repeat(order[-(len(order) % processes or 1) :][:1], missing)])
    return list(order.reshape(-1, processes))


def batches_alike(costs: np.ndarray, count: int) -> list[np.ndarray]:
    """All units, `count` of similar cost together, the most expensive first; the last ones may be fewer."""
    order = np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable")
    return [order[start : start + count] for start in range(0, len(order), count)]
