"""The weights of the tokens of each step, in all processes: an update without any is left out. Knows steps, no rule.

add -> ... -> leaves_out -> leave_out -> the optimizer's step -> end_update -> end_step
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from ..config import ScoreWarning
from .refused_uses import steps_in_backward
from .trainer_patches import UpdatePatch


class StepWeights:
    """Adds up the weights of the learnt tokens of a step.

    Args:
        trainer: the trainer of the run.
        of: what gives the weights, the beginning of a message.
        means: a list to which the mean weight of each step, of all processes, is added.
    """

    def __init__(self, trainer: Trainer, of: str, means: list[float]) -> None:
        self._trainer, self._of, self._means = trainer, of, means
        self._update = UpdatePatch(trainer)
        self._added: list[tuple[float | Tensor, ...]] = []
        self._weight, self._tokens = 0.0, 0.0  # the sums of the present step, of all processes
        self._ends = (0.0, 0.0)  # of the present step: rows with an end token to learn, and those where its weight is 0
        self.ends = self.ends_masked = 0  # of all steps
        self._told = False

    def add(self, weight: float | Tensor, tokens: float | Tensor, ends: tuple[int, int] = (0, 0)) -> None:
        """Add the sum of the weights of a micro-batch's learnt tokens, and their number; NaN where it is not known.

        With `ends`, how many rows have an end token to learn, and in how many its weight is 0.
        """
        self._added.append((weight, tokens, *ends))

    def leaves_out(self) -> bool:
        """Before the optimizer's step: whether no token of the step has a weight above 0, in any process."""
        self._weight, self._tokens, *ends = self._of_all()
        self._ends = (ends[0], ends[1])
        return self._is_empty

    @property
    def _is_empty(self) -> bool:
        return self._tokens > 0 and self._weight == 0

    def leave_out(self) -> None:
        """After `leaves_out`: if so, leave out the optimizer's step, unless it was made in the backward; warn once."""
        if not self._is_empty:
            return
        args, possible = self._trainer.args, not steps_in_backward(self._trainer)
        if possible:
            self._update.unscaled = (args.max_grad_norm or 0) > 0
            self._update.leave_out()
        if not self._told and args.process_index == 0:
            step = self._trainer.state.global_step + 1
            what = "its update is left out" if possible else "nothing is learnt from them"
            warnings.warn(
                f"{self._of} gives each of the {int(self._tokens)} tokens of step {step} the weight 0: {what}, as of "
                "later steps like it. Choose other weights if that is no exception.",
                ScoreWarning,
                stacklevel=2,
            )
        self._told = True

    def end_update(self) -> None:
        """The optimizer was asked for its step: let it make the next one."""
        self._update.restore()

    def end_step(self) -> None:
        """Note the mean weight of the step that the trainer has made, and its rows' ends."""
        self._added = []
        self.ends, self.ends_masked = self.ends + int(self._ends[0]), self.ends_masked + int(self._ends[1])
        if self._tokens and math.isfinite(self._weight):
            self._means.append(self._weight / self._tokens)

    def _of_all(self) -> list[float]:
        """The sums of the present step in all processes, in the order of `add`."""
        own = [sum(float(each[place]) for each in self._added) for place in range(4)]
        if self._trainer.args.world_size > 1:
            mine: Any = torch.tensor([own], dtype=torch.float64, device=self._trainer.args.device)
            own = self._trainer.accelerator.gather(mine).sum(0).tolist()
        return own
