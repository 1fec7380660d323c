"""Which process takes what: every unit once, expensive ones first, and no process waits longer than for a unit."""

from __future__ import annotations

import heapq

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resofilter_trainer.scoring.distribution import guided_chunks, rounds

costs = st.lists(st.integers(0, 1000), max_size=200).map(np.array)
processes = st.integers(1, 40)


def finish_times(costs: np.ndarray, speeds: list[float]) -> list[float]:
    """When each process finishes, if a free process takes the next chunk."""
    free = [(0.0, process) for process in range(len(speeds))]
    heapq.heapify(free)
    ends = [0.0] * len(speeds)
    for chunk in guided_chunks(costs, len(speeds)):
        now, process = heapq.heappop(free)
        ends[process] = now + costs[chunk].sum() / speeds[process]
        heapq.heappush(free, (ends[process], process))
    return ends


@given(costs, processes)
@settings(max_examples=200, deadline=None)
def test_chunks_cover_every_unit_once_in_order(costs, processes):
    chunks = guided_chunks(costs, processes)
    assert [unit for chunk in chunks for unit in range(chunk.start, chunk.stop)] == list(range(len(costs)))
    assert all(chunk.stop > chunk.start for chunk in chunks)


@given(costs, processes)
@settings(max_examples=200, deadline=None)
def test_a_chunk_of_several_units_is_small_against_what_is_left(costs, processes):
    for chunk in guided_chunks(costs, processes):
        if chunk.stop - chunk.start > 1:
            assert costs[chunk].sum() <= costs[chunk.start :].sum() / (16 * processes) + 1e-9
            assert costs[chunk].sum() <= 16 * costs.mean() + 1e-9


@pytest.mark.parametrize("slow", [1.0, 0.5, 0.1])
def test_a_slow_process_does_not_hold_the_others_for_long(slow):
    costs = np.sort(np.random.default_rng(0).integers(200, 1000, 2000))[::-1]
    speeds = [1.0] * 7 + [slow]
    ends = finish_times(costs, speeds)
    assert max(ends) <= 1.05 * costs.sum() / sum(speeds)  # where each has its share beforehand: 8 / (7 + slow) / slow


@given(costs, processes)
@settings(max_examples=200, deadline=None)
def test_rounds_have_every_unit_once_and_fill_up_the_last(costs, processes):
    found = rounds(costs, processes)
    assert all(len(each) == processes for each in found)
    assert len(found) == -(-len(costs) // processes)
    units = np.concatenate([np.empty(0, dtype=int), *found])
    assert sorted(set(units.tolist())) == list(range(len(costs)))
    first = [unit for each in found for place, unit in enumerate(each) if unit not in each[:place]]
    assert sorted(first) == list(range(len(costs)))  # each counts once


def test_units_of_a_round_cost_alike():
    found = rounds(np.array([1, 9, 2, 8, 3, 7]), 2)
    assert [sorted(each.tolist()) for each in found] == [[1, 3], [4, 5], [0, 2]]
