"""Where a run stands, as a function of what is known. Arithmetic: knows no data, no Trainer.

The Trainer counts steps, and takes every epoch to be as long as one on all rows. True epochs are shorter, so the step
alone says where a run stands:

    step                 0   1   2   3   4   5   6   7   8
    true epoch           0---------------|1------|2------|         of 4, 2 and 2 steps
    the Trainer believes 0---------------|1---------------|        of 4 steps each

Without an interruption, a true epoch begins where one of the Trainer's epochs begins. When a run resumes at step 7, the
Trainer believes that it is in epoch 1 with 3 steps done, and skips these first.
"""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Plan


@dataclass(frozen=True)
class Position:
    """Where a run stands when an epoch of the Trainer's begins, and what the sampler gives in it.

    Attributes:
        epoch: the true epoch, counted from 0.
        steps_done: the steps of this epoch that are made already.
        skipped_slots: the slots given first, which the Trainer skips; any rows will do.
        first_slot: the slot of the true epoch to continue at after them; None where the Trainer's epoch only skips,
            and trains nothing.
    """

    epoch: int
    steps_done: int
    skipped_slots: int
    first_slot: int | None

    @property
    def trains(self) -> bool:
        """Whether anything is trained in this epoch of the Trainer's."""
        return self.first_slot is not None

    @property
    def draws_again(self) -> bool:
        """Whether the Trainer makes an iterator, and draws its random number, which an uninterrupted run did not.

        Where it skips steps first, the Trainer restores the random state itself.
        """
        return bool(self.first_slot) and not self.skipped_slots


def position(plan: Plan, ended_epochs: int, step: int, skipped_steps: int = 0) -> Position:
    """Where a run stands when an epoch of the Trainer's begins.

    Args:
        plan: the rows and steps of each epoch.
        ended_epochs: the number of true epochs that have ended.
        step: the number of steps made, as the Trainer counts them.
        skipped_steps: the number of steps that the Trainer skips first in its epoch: after resuming what it believes
            to be done of it (see `steps_to_skip`), otherwise 0.

    Returns:
        The position. Where the Trainer skips the steps of the true epoch itself, the sampler gives the whole epoch.
        Where it believes to be in an earlier epoch and skips some of that, what it has left of it may be less than the
        true epoch needs: it only skips, and the true epoch continues in the Trainer's next one.
    """
    slots_per_step = plan.batching.accumulation * plan.batching.per_micro_batch
    steps_done = step - plan.first_step(ended_epochs)
    believed_epoch = step // plan.full_steps
    skipped_batches, first_slot = skipped_steps * plan.batching.accumulation, steps_done * slots_per_step
    skipped_slots = skipped_batches * plan.batching.per_skipped_batch
    if ended_epochs >= len(plan.sizes) or step >= plan.total:
        return Position(ended_epochs, steps_done, skipped_slots, None)
    if skipped_steps and (believed_epoch, skipped_slots) == (ended_epochs, first_slot):
        return Position(ended_epochs, steps_done, 0, 0)
    if skipped_steps and believed_epoch < ended_epochs:
        return Position(ended_epochs, steps_done, skipped_slots, None)
    return Position(ended_epochs, steps_done, skipped_slots, first_slot)


def steps_to_skip(plan: Plan, step: int, ignore_data_skip: bool) -> int:
    """The number of steps that the Trainer skips in its first epoch after resuming at a step."""
    return 0 if ignore_data_skip else step % plan.full_steps
