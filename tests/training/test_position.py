"""Wherever a run resumes, the Trainer is given the rest of it and nothing else: every combination of small runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from resofilter_trainer.training.plan import Batching, Plan
from resofilter_trainer.training.position import Position, position, steps_to_skip

ROWS = 7
SIZES = (1, 3, 4, 7)
EPOCHS = (1, 2, 3)


def plans(accumulation: int, processes: int, drop_last: bool, dispatched: int = 0) -> list[Plan]:
    """Every combination of sizes with a batch in each epoch; half of a last epoch; a fixed number of steps."""
    batching = Batching(ROWS, 2, processes, accumulation, drop_last, dispatched)
    found = []
    for epochs in EPOCHS:
        for sizes in itertools.product(SIZES, repeat=epochs):
            if all(batching.micro_batches(size) for size in sizes):
                found += [Plan(batching, sizes, length) for length in (epochs, epochs - 0.5)]
                found.append(Plan(batching, sizes, epochs, max_steps=epochs * batching.steps(ROWS) - 1))
    return found


def slots_of(plan: Plan, epoch: int) -> list[tuple[int, int]]:
    """The slots of a true epoch, each known by the epoch and its number."""
    count = len(plan.batching.slots(np.arange(plan._rows(epoch))))
    return [(epoch, slot) for slot in range(count)]


def steps_of(plan: Plan, slots: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """Slots as the Trainer takes them, a list for each step."""
    micro_batch = plan.batching.per_micro_batch
    if plan.batching.drop_last:
        slots = slots[: len(slots) // micro_batch * micro_batch]
    size = micro_batch * plan.batching.accumulation
    return [slots[start : start + size] for start in range(0, len(slots), size)]


def uninterrupted(plan: Plan) -> list[list[tuple[int, int]]]:
    """What each step of the whole run is made on, by the plan alone."""
    steps = [step for epoch in range(len(plan.sizes)) for step in steps_of(plan, slots_of(plan, epoch))]
    return steps[: plan.total]


class Loop:
    """The Trainer's loop: it skips, takes steps until its epoch is full or nothing comes, and stops at the total."""

    def __init__(self, plan: Plan, step: int, ended: int, ignore_data_skip: bool) -> None:
        self.plan, self.step, self.ended = plan, step, ended
        self.to_skip = steps_to_skip(plan, step, ignore_data_skip)
        self.trained: list[list[tuple[int, int]]] = []

    def run(self) -> Loop:
        for _ in range(self.step // self.plan.full_steps, len(self.plan.sizes)):
            self.epoch()
            self.to_skip = 0
            if self.step >= self.plan.total:
                break
        return self

    def epoch(self) -> None:
        at = position(self.plan, self.ended, self.step, self.to_skip)
        given: list[tuple[int, int]] = [(-1, -1)] * at.skipped_slots
        if at.first_slot is not None:
            given += slots_of(self.plan, self.ended)[at.first_slot :]
        skipped = self.to_skip * self.plan.batching.accumulation * self.plan.batching.per_skipped_batch
        steps = steps_of(self.plan, given[skipped:])
        for step in steps[: self.plan.full_steps - self.to_skip]:
            self.trained.append(step)
            self.step += 1
            if self.step >= self.plan.total:  # which the Trainer asks after a step, never before one
                break
        if at.trains and self.step < self.plan.total:  # a true epoch ends with the Trainer's, or log and save are wrong
            assert self.step - self.plan.first_step(self.ended) == self.plan.steps(self.ended)
            self.ended += 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("ignore_data_skip", [False, True])
def test_every_small_run_resumed_at_every_step_trains_the_rest(accumulation, processes, drop_last, ignore_data_skip):
    tried = 0
    for plan in plans(accumulation, processes, drop_last):
        whole = uninterrupted(plan)
        assert Loop(plan, 0, 0, ignore_data_skip).run().trained == whole
        for step in range(plan.total + 1):
            ended = sum(plan.first_step(epoch + 1) <= step for epoch in range(len(plan.sizes)))
            assert Loop(plan, step, ended, ignore_data_skip).run().trained == whole[step:], (plan, step)
            tried += 1
    assert tried > 10  # else nothing was tried


@pytest.mark.parametrize("ignore_data_skip", [False, True])
def test_where_one_process_loads_and_skips_less_the_rest_is_trained(ignore_data_skip):
    """Accelerate skips batches of the loader, of which two make a micro-batch of two processes."""
    for plan in plans(accumulation=2, processes=2, drop_last=False, dispatched=2):
        whole = uninterrupted(plan)
        for step in range(plan.total + 1):
            ended = sum(plan.first_step(epoch + 1) <= step for epoch in range(len(plan.sizes)))
            assert Loop(plan, step, ended, ignore_data_skip).run().trained == whole[step:], (plan, step)


def test_a_run_that_starts_is_given_each_epoch_whole():
    plan = Plan(Batching(rows=8, per_process=2), [8, 4, 4], 3)
    assert [position(plan, epoch, step) for epoch, step in ((0, 0), (1, 4), (2, 6))] == [
        Position(0, 0, 0, 0),
        Position(1, 0, 0, 0),
        Position(2, 0, 0, 0),
    ]


PLAN = Plan(Batching(rows=8, per_process=2), [8, 4, 8], 3)  # 4, 2 and 4 steps; the Trainer believes in 4 each


@pytest.mark.parametrize(
    ("ended", "step", "skipped", "expected"),
    [
        (0, 3, 3, Position(0, 3, 0, 0)),  # both agree: the Trainer skips the true epoch's own steps
        (0, 3, 0, Position(0, 3, 0, 6)),  # it skips nothing: the sampler leaves out what is done
        (2, 7, 3, Position(2, 1, 6, None)),  # it skips in an earlier epoch: it only skips
        (2, 7, 0, Position(2, 1, 0, 2)),  # and the rest comes in its next
        (2, 9, 1, Position(2, 3, 2, 6)),  # in the same epoch, with other steps done: skip some, then the rest
        (3, 10, 2, Position(3, 0, 4, None)),  # nothing is left
    ],
)
def test_what_the_trainer_believes_and_what_is_true(ended, step, skipped, expected):
    assert position(PLAN, ended, step, skipped) == expected


@pytest.mark.parametrize(
    ("at", "draws"),
    [
        (Position(0, 0, 0, 0), False),
        (Position(0, 3, 0, 6), True),
        (Position(2, 3, 2, 6), False),
        (Position(2, 1, 6, None), False),
    ],
)
def test_the_iterator_that_an_uninterrupted_run_does_not_make(at, draws):
    assert at.draws_again == draws
