"""The k-th smallest of values that fit no memory, exactly. Arithmetic: knows no rows, no tables.

    pass 1    count the values by their first 20 bits: the sign, the exponent and 8 bits of the fraction
    pass 2    gather the values with the same first bits as those that are looked for, and sort them

After the first pass a value is known to within 2**-8 of itself; after the second exactly. Where more values share their
first bits than are to be in memory, as scores that lie close together do, the next 20 bits are counted in between.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

Read = Callable[[], Iterable[np.ndarray]]  # the values again, in any pieces: finite, (N,) in all
BITS = 20  # counted in a pass
GATHERED = 1 << 24  # values in memory, at most: 128 MiB
CACHED = 1 << 15
SIGN = np.uint64(1 << 63)
ALL = np.uint64(2**64 - 1)
Span = tuple[int, int]  # the first of consecutive keys, and how many of their last bits are free


@dataclass(frozen=True)
class Placed:
    """A value and its place among all.

    Attributes:
        value: the value.
        below, equal, above: the numbers of values below it, equal to it (itself, too) and above it.
    """

    value: float
    below: int
    equal: int
    above: int


def order_statistics(read: Read, places: Callable[[int], Sequence[int]]) -> tuple[int, list[Placed]]:
    """The number of values, and those at some places of all values in ascending order. -0.0 is 0.0.

    Args:
        read: a function that gives the values, the same each time it is called; it is called one to five times.
        places: a function from the number of values to the places, counted from 0.
    """
    whole = (0, 64)
    counted = _count(read, {whole})
    total = int(counted[whole].sum())
    looked_for = list(places(total))
    spans = {place: _narrowed(whole, counted[whole], 0, place) for place in looked_for}
    while any(bits for (_, bits), _, _ in spans.values()):
        sizes = {span: count for span, _, count in spans.values() if span[1]}
        if sum(sizes.values()) <= GATHERED:
            gathered = _gather(read, sizes)
            return total, [_placed(*spans[place], place, total, gathered) for place in looked_for]
        counted = _count(read, sizes)
        for place, (span, below, _) in spans.items():
            if span[1]:
                spans[place] = _narrowed(span, counted[span], below, place)
    return total, [_placed(*spans[place], place, total, {}) for place in looked_for]


def quantiles(read: Read, shares: Sequence[float]) -> list[float]:
    """Quantiles as `numpy.quantile` interpolates them, to the bit.

    Args:
        read: as for `order_statistics`; it gives at least one value.
        shares: the quantiles, from 0 to 1.
    """

    def places(count: int) -> list[int]:
        below = {int(np.floor(share * (count - 1))) for share in shares}
        return sorted(below | {min(each + 1, count - 1) for each in below})

    count, placed = order_statistics(read, places)
    found = dict(zip(places(count), (each.value for each in placed), strict=True))
    quantiles = []
    for share in shares:
        at = share * (count - 1)
        low = int(np.floor(at))
        quantiles.append(float(np.quantile([found[low], found[min(low + 1, count - 1)]], at - low)))
    return quantiles


def keys_of(values: np.ndarray) -> np.ndarray:
    """(N,) uint64 in the order of the values: their bits, with the sign turned, and all bits of negative ones."""
    whole = (values + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0
    keys: np.ndarray = (whole >> 63).view(np.uint64)  # all bits of a negative value
    keys |= SIGN
    keys ^= whole.view(np.uint64)
    return keys


def _value(key: int) -> float:
    bits = np.uint64(key)
    return float((bits ^ (SIGN if bits >= SIGN else ALL)).view(np.float64))


def _keys(read: Read) -> Iterator[np.ndarray]:
    """The keys of all values, as many at a time as a processor's cache holds."""
    for values in read():
        for start in range(0, len(values), CACHED):
            yield keys_of(values[start : start + CACHED])


def _narrowed(span: Span, counts: np.ndarray, below: int, place: int) -> tuple[Span, int, int]:
    """The span of the next bits with a place, the number of values below that span, and of those in it."""
    first, bits = span
    ends = np.cumsum(counts)
    number = int(np.searchsorted(ends, place - below, side="right"))
    free = max(bits - BITS, 0)
    return (first + (number << free), free), below + int(ends[number] - counts[number]), int(counts[number])


def _placed(span: Span, below: int, count: int, place: int, total: int, gathered: dict[Span, np.ndarray]) -> Placed:
    """The value at a place, whose span is known; the span is one key, or its keys are gathered."""
    key = span[0]
    if span[1]:
        keys = gathered[span]
        key = int(keys[place - below])
        smaller, until = (int(np.searchsorted(keys, np.uint64(key), side=side)) for side in ("left", "right"))
        below, count = below + smaller, until - smaller
    return Placed(_value(key), below, count, total - below - count)


def _count(read: Read, spans: Iterable[Span]) -> dict[Span, np.ndarray]:
    """For each span, the number of keys by their next bits."""
    sizes = {(first, bits): min(bits, BITS) for first, bits in spans}
    counts = {span: np.zeros(1 << size, dtype=np.int64) for span, size in sizes.items()}
    one = np.ones(CACHED, dtype=np.int64)
    for keys in _keys(read):
        for (first, bits), size in sizes.items():
            own = _within(keys, first, bits) >> np.uint64(bits - size)
            np.add.at(counts[first, bits], own.view(np.int64), one[: len(own)])
    return counts


def _gather(read: Read, spans: Iterable[Span]) -> dict[Span, np.ndarray]:
    """The keys of each span, ascending."""
    found: dict[Span, list[np.ndarray]] = {span: [] for span in spans}
    for keys in _keys(read):
        for (first, bits), own in found.items():
            own.append(_within(keys, first, bits) + np.uint64(first))
    return {span: np.sort(np.concatenate(own)) for span, own in found.items()}


def _within(keys: np.ndarray, first: int, bits: int) -> np.ndarray:
    """The keys of a span, from its first key on."""
    if bits == 64:
        return keys
    from_first = keys - np.uint64(first)  # wraps for smaller keys, which are then far above
    return from_first[from_first < np.uint64(1 << bits)]
