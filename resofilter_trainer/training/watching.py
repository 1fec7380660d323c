"""What a run measures of its samples, step by step and in every process. Knows micro-batches, decides nothing.

expect -> [forward, backward] x accumulation -> before_step -> the step -> after_step -> end_step -> gather
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import gather_object
from transformers import Trainer

from ..config import ResonanceConfig
from ..model.gradients import segments_of
from ..model.training_recorder import MicroBatch, StepRecorder, TrainingRecorder, recorders
from ..model.up_projection import find_up_projections
from . import trainer_access as access
from .measurements import Measured, Measurements
from .plan import Batching
from .weighting import weights_of


class Watch:
    """Measures the samples of one run.

    Args:
        trainer: the trainer of the run.
        config: the step to measure, and how.
        batching: how rows become steps.
        each_step: whether samples are measured while they are trained on; otherwise only `measurements` is used.

    Attributes:
        measurements: the last measurement of every row, of all processes up to the last `gather`.

    Raises:
        InputError: the model has no known up-projection, or the update cannot be measured at this number of samples.
    """

    def __init__(self, trainer: Trainer, config: ResonanceConfig, batching: Batching, each_step: bool) -> None:
        self._trainer = trainer
        self._recorder: TrainingRecorder | None = None
        self._step_recorder: StepRecorder | None = None
        if each_step:
            samples = batching.per_micro_batch * batching.accumulation
            self._recorder, self._step_recorder = recorders(cast(Any, trainer.model), config, samples)
        found = find_up_projections(cast(Any, trainer.model), config.n_layers, config.up_projection)
        self.measurements = Measurements(batching.rows, sorted({each.layer for each in found}))
        self._expected: list[MicroBatch] = []
        self._rows: Sequence[np.ndarray] = []  # of each expected micro-batch
        self._moved: np.ndarray | None = None  # (L,) by the optimizer's last step
        self._pending: list[Measured] = []  # of this process, since the last gather

    def attach(self) -> None:
        """Add the hooks to the model."""
        if self._recorder is not None:
            self._recorder.attach()

    def detach(self) -> None:
        """Leave the model as it was found."""
        if self._recorder is not None:
            self._recorder.detach()

    def expect(
        self, batches: Sequence[Any], rows: Sequence[np.ndarray], num_items: Any, weights: np.ndarray | None
    ) -> None:
        """Announce the micro-batches of the next step.

        Args:
            batches: the micro-batches.
            rows: the rows of each, an array for each micro-batch.
            num_items: the number of learnt tokens of the whole step, as the Trainer counts them.
            weights: (N,) the weight of every row's loss; None where all weigh the same.
        """
        if self._recorder is None:
            return
        self._rows, self._expected = rows, []
        for batch, own_rows in zip(batches, rows, strict=True):
            weight = access.token_weight(self._trainer, num_items, batch, len(batches))
            if weights is not None:
                weight = weight * torch.tensor(weights_of(own_rows, weights), device=batch["labels"].device)
            segments = segments_of(batch)[: len(own_rows)]
            self._expected.append(MicroBatch(batch["input_ids"], batch["labels"], segments, weight))
        self._recorder.expect(self._expected)

    def before_step(self) -> None:
        """Remember the weights, where the optimizer's own step is measured."""
        if self._step_recorder is not None:
            self._step_recorder.before()

    def after_step(self) -> None:
        """Compare the weights with the remembered ones."""
        if self._step_recorder is not None:
            self._moved = self._step_recorder.after()

    def end_step(self, epoch: int, step: int) -> None:
        """Keep what was measured of the samples of a step.

        Args:
            epoch: the true epoch, counted from 0.
            step: the number of steps made, this one included.
        """
        if self._recorder is None:
            return
        for rows, batch, found in zip(self._rows, self._expected, self._recorder.take(), strict=True):
            length = np.array([each.tokens.stop - each.tokens.start for each in batch.segments])
            layers = found.layers if self._moved is None else self._moved[None]
            self._pending.append(Measured(epoch, step, rows, found.loss, found.num_tokens, length, layers))
        self._rows, self._expected = [], []

    def gather(self) -> None:
        """Add what all processes have measured to the measurements of each."""
        pending, self._pending = self._pending, []
        if self._trainer.args.world_size > 1:
            pending = sorted(gather_object(pending), key=lambda each: each.step)
        for each in pending:
            self.measurements.add(each)
