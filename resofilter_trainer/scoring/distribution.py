"""Which process takes which units of work, and when it asks for more. Knows costs and counts: no devices, no models.

    units, dearest first -> chunks of some neighbours, smaller and smaller -> whoever is free takes the next

Guided self-scheduling (Polychronopoulos and Kuck, 1987): a slow process takes fewer chunks, and the last are single
units, so that nobody waits long for it. Neighbours stay together because they may share work.
"""

from __future__ import annotations

import numpy as np

PER_PROCESS = 4  # chunks of what is left, at least
MOST = 16.0  # units of average cost in a chunk: asking takes a fraction of a millisecond


def guided_chunks(costs: np.ndarray, processes: int) -> list[slice]:
    """Units of work, in their order, as chunks to be taken one after another.

    Args:
        costs: (N,) of each unit, in any unit of cost, such as tokens.
        processes: that will take them, at least 1.

    Returns:
        Slices that cover 0..N. A chunk costs at most a `4 * processes`-th of what is left when it is taken, and at most
        16 average units; but it has a unit at least.
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
    """Units of work as rounds in which every process takes one, for processes that must keep in step.

    Args:
        costs: (N,) of each unit.
        processes: P.

    Returns:
        Arrays of P places, units of like cost together, the dearest first. Where the last round has too few, its first
        is repeated: what it gives the second time is to be left out.
    """
    order = np.argsort(-np.asarray(costs, dtype=np.float64), kind="stable")
    missing = -len(order) % processes
    order = np.concatenate([order, np.repeat(order[-(len(order) % processes or 1) :][:1], missing)])
    return list(order.reshape(-1, processes))
