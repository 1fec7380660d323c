"""How many rows, micro-batches and steps each epoch has when rows become fewer. Arithmetic: knows no data, no Trainer.

With packing, a row here is a pack of them.

rows of an epoch -> slots -> micro-batches of every process -> steps of `accumulation` micro-batches
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Batching:
    """How rows become steps.

    Attributes:
        rows: the number of rows of the whole dataset.
        per_process: the number of rows in one process's micro-batch.
        processes: the number of processes that share the rows.
        accumulation: the number of micro-batches of one step.
        drop_last: whether rows that do not fill a micro-batch are left out of their epoch.
        repeats: whether several processes repeat rows to end an epoch, as Accelerate does.
        dispatched: the rows of one batch of the loader, where one process loads the rows of all and sends each its own
            (Accelerate's `dispatch_batches`); 0 where each loads its own.
    """

    rows: int
    per_process: int
    processes: int = 1
    accumulation: int = 1
    drop_last: bool = False
    repeats: bool = False
    dispatched: int = 0

    @property
    def per_micro_batch(self) -> int:
        """The rows of one micro-batch over all processes."""
        return self.per_process * self.processes

    @property
    def per_skipped_batch(self) -> int:
        """The rows that are skipped for each micro-batch that the Trainer skips when it resumes.

        Where one process loads, Accelerate skips as many batches of its loader, of which several make a micro-batch.
        """
        return self.dispatched or self.per_micro_batch

    def micro_batches(self, rows: int) -> int:
        """The micro-batches of an epoch on so many rows; the last may be smaller."""
        return rows // self.per_micro_batch if self.drop_last else math.ceil(rows / self.per_micro_batch)

    def steps(self, rows: int) -> int:
        """The steps of an epoch on so many rows; the last may have fewer micro-batches."""
        return math.ceil(self.micro_batches(rows) / self.accumulation)

    def slots(self, order: np.ndarray) -> np.ndarray:
        """An epoch's rows as its batches take them.

        Several processes need batches of the same size. A run that drops no row repeats the first rows, as Accelerate
        does, and so trains as without the callback: until the last batch is full, or, where one process loads the rows,
        until all processes have as many of them. Any other run adds fillers, whose labels are masked: they have no
        loss, no token and no gradient, so every step equals that of a single process.

        Args:
            order: (K,) rows in the order of the epoch.

        Returns:
            (S,) rows, or `~row` for a filler that is a copy of that row.
        """
        if self.processes == 1 or self.drop_last:
            return order
        size = self.per_micro_batch
        if self.repeats:
            whole = self.processes if self.dispatched else size
            return np.resize(order, math.ceil(len(order) / whole) * whole)
        whole = len(order) // size * size
        if whole == len(order):
            return order
        filled = np.full((self.processes, self.per_process), ~order[0])
        for process, rows in enumerate(np.array_split(order[whole:], self.processes)):
            filled[process, : len(rows)] = rows
        return np.concatenate([order[:whole], filled.ravel()])


@dataclass(frozen=True)
class Plan:
    """How many rows each epoch trains on, and what follows from it.

    Attributes:
        batching: how rows become steps.
        sizes: the number of rows of each epoch.
        epochs: the number of epochs; the last may be a fraction of one.
        max_steps: the number of steps where the user fixes it; every epoch then has as many as one on all rows.
    """

    batching: Batching
    sizes: Sequence[int]
    epochs: float
    max_steps: int | None = None

    @property
    def full_steps(self) -> int:
        """The steps of an epoch on all rows, which the Trainer takes every epoch to have."""
        return self.batching.steps(self.batching.rows)

    def micro_batches(self, epoch: int) -> int:
        """The micro-batches of an epoch, counted from 0."""
        return self.batching.micro_batches(self._rows(epoch))

    def steps(self, epoch: int) -> int:
        """The steps of an epoch, counted from 0."""
        return self.batching.steps(self._rows(epoch))

    def first_step(self, epoch: int) -> int:
        """The number of steps before an epoch."""
        return sum(self.steps(each) for each in range(epoch))

    @property
    def total(self) -> int:
        """The steps of the whole run."""
        if self.max_steps is not None:
            return self.max_steps
        last = len(self.sizes) - 1
        of_last = math.ceil(self.epochs * self.steps(last)) - last * self.steps(last)  # rounded as the Trainer does
        return self.first_step(last) + of_last

    def _rows(self, epoch: int) -> int:
        return self.batching.rows if self.max_steps is not None else self.sizes[epoch]


@dataclass(frozen=True)
class Progress:
    """How far along its schedule the learning rate is at each step, when the number of steps changes during the run.

    The schedule is made once, for `scheduled` steps. A change of the total stretches the rest of it, so the learning
    rate is continuous and ends where it should.

    Attributes:
        scheduled: the number of steps that the schedule was made for.
        knots: (step, step of the schedule), ascending, with straight lines between them.
    """

    scheduled: int
    knots: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, total: int) -> Progress:
        """The progress of a run whose number of steps does not change."""
        return cls(total, ((0, 0), (total, total)))

    def at(self, step: int) -> float:
        """The step of the schedule at a step of the run."""
        right = min(max(bisect_right([knot[0] for knot in self.knots], step), 1), len(self.knots) - 1)
        (start, low), (end, high) = self.knots[right - 1], self.knots[right]
        return low + (step - start) * (high - low) / (end - start)

    def replanned(self, step: int, total: int) -> Progress:
        """The same until `step`, then straight to the schedule's end at `total`."""
        if total == self.knots[-1][0] or total <= step:
            return self
        before = tuple(knot for knot in self.knots if knot[0] < step)
        return Progress(self.scheduled, (*before, (step, min(self.at(step), self.scheduled)), (total, self.scheduled)))
