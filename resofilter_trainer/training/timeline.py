"""The plan of one run, applied to its Trainer: rows of each epoch, steps, learning rate. Knows no scores.

The only counter is the number of true epochs that have ended; where the run stands follows from the plan and the
Trainer's step (see `position`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from transformers import Trainer

from ..config import InputError
from . import trainer_access as access
from .filtering import FilterConfig
from .plan import Batching, Plan, Progress
from .position import Position, position, steps_to_skip
from .sampler import ShrinkingSampler


class Timeline:
    """Which epoch and step a run is at, and what the Trainer is told about it.

    Args:
        trainer: the trainer, about to start or to resume.
        sampler: the trainer's own sampler.
        batching: how rows become steps.
        filtering: the settings of the filter: which rows to drop, and when.

    Attributes:
        plan: the rows and steps of each epoch.
        ended_epochs: the number of true epochs that have ended.
        sampler: the sampler that gives each epoch its rows.
    """

    def __init__(self, trainer: Trainer, sampler: Any, batching: Batching, filtering: FilterConfig) -> None:
        args, state = trainer.args, trainer.state
        self._trainer, self._filter = trainer, filtering
        self.epochs, self._trainers_total = int(state.num_train_epochs), state.max_steps
        max_steps = args.max_steps if args.max_steps > 0 else None
        length = min(args.num_train_epochs, self.epochs) if max_steps is None else self.epochs
        self.plan = Plan(batching, filtering.sizes(self.epochs, batching.rows), length, max_steps)
        self.sampler = ShrinkingSampler(sampler, batching, max_steps is not None)
        self.ended_epochs = 0
        self._progress = Progress.of(self.plan.total)
        self._extended = False  # to another number of epochs or steps than the checkpoint's run has
        self._skipped_steps = 0  # by the Trainer, in its first epoch after resuming
        self._given = 0  # micro-batches that the Trainer has got or skipped in its present epoch
        self._position = Position(0, 0, 0, 0)  # when the Trainer's present epoch began

    @property
    def steps_done(self) -> int:
        """The steps of the present true epoch that are made."""
        return self._trainer.state.global_step - self.plan.first_step(self.ended_epochs)

    @property
    def over(self) -> bool:
        """Whether every true epoch has ended."""
        return self.ended_epochs >= self.epochs

    @property
    def epoch_is_complete(self) -> bool:
        """Whether all steps of the present true epoch are made."""
        return not self.over and self.steps_done >= self.plan.steps(self.ended_epochs)

    @property
    def trains(self) -> bool:
        """Whether anything is trained in the Trainer's present epoch; otherwise it only skips."""
        return self._position.trains

    def install(self, starts: bool) -> None:
        """Tell the Trainer the number of steps, and let the learning rate follow."""
        anew = starts or self._extended
        access.set_total(self._trainer, self.plan.total, intervals=anew)
        self._follow_progress(now=anew)

    def plan_start(self, kept: np.ndarray, sizes: Sequence[int]) -> None:
        """Plan the run anew before its first step, on fewer rows.

        Args:
            kept: (N,) bool, the rows of the first epoch.
            sizes: the number of rows of each epoch, as far as it is known.
        """
        self.sampler.begin(0, kept)
        self.replan(kept, sizes)
        self._progress = Progress.of(self.plan.total)

    def begin_epoch(self) -> None:
        """Tell the sampler which slots to give in the Trainer's epoch that begins."""
        step = self._trainer.state.global_step
        self._position = position(self.plan, self.ended_epochs, step, self._skipped_steps)
        self.sampler.place(self._position)
        self._given, self._skipped_steps = self._skipped_steps * self.plan.batching.accumulation, 0

    def asked(self, count: int) -> int:
        """The micro-batches of a step for which the Trainer asks, at most those that its epoch has left.

        Where it resumes within an epoch whose last step has fewer, transformers before 5 asks for as many as usual.
        """
        batching = self.plan.batching
        count = max(min(count, batching.micro_batches(batching.rows) - self._given), 0)
        self._given += count
        return count

    def begin_step(self) -> None:
        """Undo the random draw of an iterator that the uninterrupted run did not make, before its first step."""
        if self._position.draws_again:
            self.sampler.undo_draw()
            self._position = dataclasses.replace(self._position, first_slot=0)

    def end_step(self) -> None:
        """Set the Trainer's epoch to the true one."""
        accumulation, planned = self.plan.batching.accumulation, self.plan.micro_batches(self.ended_epochs)
        done = min(self.steps_done * accumulation, planned)
        self._trainer.state.epoch = self.ended_epochs + done / planned

    def next_epoch(self, kept: np.ndarray, sizes: Sequence[int] | None) -> None:
        """End the present true epoch; the next one trains on the rows `kept`, (N,) bool.

        Args:
            kept: (N,) bool, the rows of the next epoch.
            sizes: the number of rows of each epoch, as far as it is known; None to leave the plan as it is.
        """
        self.ended_epochs += 1
        self.sampler.begin(self.ended_epochs, kept)
        if sizes is not None:
            self.replan(kept, sizes)

    def replan(self, kept: np.ndarray, sizes: Sequence[int]) -> None:
        """Set steps and learning rate to the number of rows that there are now, from the present epoch on."""
        rows, planned, share_known = int(kept.sum()), list(self.plan.sizes), self._filter.has_shares
        most = self.plan.batching.rows if self._filter.readmit else rows
        for epoch in range(self.ended_epochs, self.epochs):
            known = share_known and epoch > self.ended_epochs
            planned[epoch] = min(sizes[epoch], most) if known or self._filter.ended(epoch) else rows
        before, self.plan = self.plan.total, dataclasses.replace(self.plan, sizes=planned)
        if self.plan.total != before:
            self._progress = self._progress.replanned(self._trainer.state.global_step, self.plan.total)
            access.set_total(self._trainer, self.plan.total, intervals=True)
            self._follow_progress(now=False)

    def extend(self, kept: np.ndarray, sizes: Sequence[int]) -> None:
        """Plan the rest of a resumed run anew, for another number of epochs or steps than the checkpoint's run has.

        From here on, the learning rate is that of a run that has this number from the start.

        Args:
            kept: (N,) bool, the rows of the present epoch.
            sizes: the number of rows of each epoch, as far as it is known.

        Raises:
            InputError: more steps are made than the run has.
        """
        if not self.over:
            self.replan(kept, sizes)
        if self.plan.total < self._trainer.state.global_step:
            raise self._too_short()
        self._progress, self._extended = Progress.of(self.plan.total), True

    def _too_short(self) -> InputError:
        return InputError(
            f"The checkpoint was made after step {self._trainer.state.global_step}, and this run ends before it. "
            "Resume with more epochs or steps."
        )

    def _follow_progress(self, now: bool) -> None:
        # otherwise the Trainer's own schedule is right; but a checkpoint of a run of another length has its last rate
        if self._extended or self._progress != Progress.of(self._trainers_total):
            access.follow_progress(self._trainer, self._progress, now)

    def to_json(self) -> dict[str, Any]:
        """The state that a checkpoint saves."""
        return {
            "epoch": self.ended_epochs,
            "steps_done": self.steps_done,
            "sizes": list(self.plan.sizes),
            "scheduled": self._progress.scheduled,
            "knots": [list(knot) for knot in self._progress.knots],
        }

    def resume(self, saved: Mapping[str, Any], checkpoint: object) -> None:
        """Continue where a checkpoint was made.

        Args:
            saved: the state that `to_json` returned.
            checkpoint: the folder of the checkpoint, for messages.

        Raises:
            InputError: the Trainer's step differs from the checkpoint's, or lies in an epoch that this run lacks.
        """
        self._progress = Progress(saved["scheduled"], tuple((step, at) for step, at in saved["knots"]))
        sizes, self.ended_epochs = saved["sizes"], saved["epoch"]
        if self.ended_epochs + (saved["steps_done"] > 0) > self.epochs:
            raise self._too_short()
        sizes = [*sizes, *self.plan.sizes[len(sizes) :]][: self.epochs]
        self.plan = dataclasses.replace(self.plan, sizes=sizes)
        if self.steps_done != saved["steps_done"]:
            raise InputError(
                f"'{checkpoint}' is damaged, or was trained further without ResonanceCallback: step "
                f"{self._trainer.state.global_step} is not step {saved['steps_done']} of epoch {saved['epoch'] + 1}. "
                "Resume from another checkpoint."
            )
        args, step = self._trainer.args, self._trainer.state.global_step
        self._skipped_steps = steps_to_skip(self.plan, step, args.ignore_data_skip)
