"""What must hold of every batch, step and learning rate, whatever the numbers of rows."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resofilter_trainer.training.plan import Batching, Plan, Progress


@st.composite
def batchings(draw, drop_last=False):
    per_process, processes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    smallest = per_process * processes if drop_last else 1  # else a full epoch has no batch at all
    return Batching(draw(st.integers(smallest, 80)), per_process, processes, draw(st.integers(1, 4)), drop_last)


@st.composite
def epochs(draw, drop_last=False):
    """A batching, and the rows of an epoch in its order: some of them or all."""
    batching = draw(batchings(drop_last))
    kept = draw(st.integers(1, batching.rows))
    return batching, np.random.default_rng(draw(st.integers(0, 9))).permutation(batching.rows)[:kept]


@given(epochs())
def test_every_row_of_an_epoch_comes_once_and_in_order(epoch):
    batching, order = epoch
    slots = batching.slots(order)
    assert slots[slots >= 0].tolist() == order.tolist()


@given(epochs())
def test_fillers_look_like_a_row_of_the_epoch(epoch):
    batching, order = epoch
    slots = batching.slots(order)
    assert set(~slots[slots < 0]) <= set(order)


@given(epochs())
def test_slots_make_as_many_micro_batches_as_planned(epoch):
    batching, order = epoch
    slots = batching.slots(order)
    assert math.ceil(len(slots) / batching.per_micro_batch) == batching.micro_batches(len(order))
    assert batching.processes == 1 or len(slots) % batching.per_micro_batch == 0  # processes need equal batches


@given(epochs())
def test_one_process_needs_no_fillers(epoch):
    batching, order = epoch
    alone = dataclasses.replace(batching, processes=1)
    assert alone.slots(order).tolist() == order.tolist()


@given(epochs())
def test_where_nothing_is_dropped_the_first_rows_are_repeated_as_accelerate_does(epoch):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    batching = dataclasses.replace(epoch[0], repeats=True)
    order = np.random.default_rng(0).permutation(batching.rows)

    def batches(rows):
        sampler = BatchSampler(rows.tolist(), batching.per_process, drop_last=False)
        shards = [BatchSamplerShard(sampler, batching.processes, each) for each in range(batching.processes)]
        return [list(shard) for shard in shards]

    if batching.processes > 1:
        assert batches(batching.slots(order)) == batches(order)


@pytest.mark.parametrize(
    ("rows", "slots"),
    [(5, [0, 1, 2, 3, 4, 0]), (7, [*range(7), 0]), (8, [*range(8)]), (6, [*range(6)]), (1, [0, 0])],
)
def test_where_one_process_loads_all_have_as_many_rows(rows, slots):
    """As Accelerate's dispatcher divides the last batch: one each of 5, two each of 7, and so on."""
    batching = Batching(rows=rows, per_process=2, processes=2, repeats=True, dispatched=2)
    assert batching.slots(np.arange(rows)).tolist() == slots


def test_rows_that_are_left_are_spread_over_the_processes():
    batching = Batching(rows=20, per_process=3, processes=2)
    assert batching.slots(np.arange(10)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, ~0, 8, 9, ~0]


@given(epochs())
def test_as_many_updates_as_the_rows_need(epoch):
    batching, order = epoch
    micro_batches = math.ceil(len(order) / batching.per_micro_batch)
    assert batching.steps(len(order)) == math.ceil(micro_batches / batching.accumulation)


def test_a_dataset_smaller_than_one_update_is_one():
    batching = Batching(rows=5, per_process=4, processes=2, accumulation=8)
    assert batching.steps(5) == batching.steps(1) == 1


@given(epochs(drop_last=True))
def test_with_drop_last_rows_that_fill_no_micro_batch_make_none(epoch):
    batching, order = epoch
    assert batching.slots(order).tolist() == order.tolist()
    assert batching.micro_batches(len(order)) == len(order) // batching.per_micro_batch


@given(batchings(), st.sampled_from([1, 2, 3, 0.3, 1.1, 2.4, 2.5, 7.7]))
def test_total_is_the_trainers_where_nothing_is_dropped(batching, length):
    updates = math.ceil(batching.micro_batches(batching.rows) / batching.accumulation)
    plan = Plan(batching, [batching.rows] * math.ceil(length), length)
    assert plan.total == math.ceil(length * updates)


@pytest.mark.parametrize(("length", "total"), [(3, 13 + 7 + 5), (2.5, 13 + 7 + 3), (2.2, 13 + 7 + 1)])
def test_total_is_of_the_steps_that_are_left(length, total):
    plan = Plan(Batching(rows=50, per_process=2, accumulation=2), [50, 27, 20], length)
    assert [plan.steps(epoch) for epoch in range(3)] == [13, 7, 5]
    assert [plan.micro_batches(epoch) for epoch in range(3)] == [25, 14, 10]
    assert plan.total == total


def test_fixed_steps_stay_and_every_epoch_is_as_long_as_a_full_one():
    plan = Plan(Batching(rows=50, per_process=2, accumulation=2), [50, 25, 20], 3, max_steps=31)
    assert plan.total == 31
    assert [plan.steps(epoch) for epoch in range(3)] == [13] * 3
    assert [plan.micro_batches(epoch) for epoch in range(3)] == [25] * 3


# ---- the learning rate


@st.composite
def replans(draw):
    """A first total, and (step, total) again and again, later and later."""
    first = total = draw(st.integers(1, 300))
    step, found = 0, []
    for _ in range(draw(st.integers(1, 4))):
        step = draw(st.integers(step, total))
        total = draw(st.integers(step + 1, step + 300))
        found.append((step, total))
    return first, found


def replanned(first: int, changes: list[tuple[int, int]]) -> Progress:
    progress = Progress.of(first)
    for step, total in changes:
        progress = progress.replanned(step, total)
    return progress


@given(st.integers(1, 10_000).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total))))
def test_as_planned_means_not_a_bit_of_difference(run):
    total, step = run
    assert Progress.of(total).at(step) == step


@given(replans())
def test_schedule_ends_where_the_run_does(run):
    first, changes = run
    assert replanned(first, changes).at(changes[-1][1]) == pytest.approx(first)


@given(replans())
def test_what_is_past_stays_and_nothing_jumps(run):
    first, changes = run
    before = replanned(first, changes[:-1])
    after = before.replanned(*changes[-1])
    steps = range(changes[-1][0] + 1)
    assert [after.at(step) for step in steps] == pytest.approx([before.at(step) for step in steps])
    assert after.at(changes[-1][0]) == before.at(changes[-1][0])


@given(replans())
def test_progress_never_goes_back_nor_past_the_end(run):
    first, changes = run
    progress = replanned(first, changes)
    found = np.array([progress.at(step) for step in range(changes[-1][1] + 1)])
    assert found[0] == 0
    assert (np.diff(found) >= -1e-9).all()
    assert found.max() <= first + 1e-9


def test_what_is_left_is_stretched():
    progress = Progress.of(100).replanned(40, 70).replanned(60, 80)
    assert [progress.at(step) for step in (20, 40, 50, 60, 70, 80)] == [20, 40, 60, 80, 90, 100]


@pytest.mark.parametrize(("step", "total"), [(40, 100), (40, 40), (40, 30)])
def test_a_total_that_changes_nothing_leaves_the_progress(step, total):
    """It is the same, or it is reached already."""
    progress = Progress.of(100)
    assert progress.replanned(step, total) == progress


@given(replans())
def test_knots_ascend(run):
    steps = [step for step, _ in replanned(*run).knots]
    assert steps == sorted(set(steps))


@given(replans())
def test_knots_survive_a_checkpoint(run):
    progress = replanned(*run)
    saved = json.loads(json.dumps([list(knot) for knot in progress.knots]))
    assert Progress(progress.scheduled, tuple((step, at) for step, at in saved)) == progress
